"""What this package touches of other people's private parts: one module per library, and the versions it was tried with.

Libraries rename such names within weeks. Everything that did move is asked for here, so that a move is one line to mend,
and every name is listed in a table that a test and ``lmms-prune doctor --installation`` hold against what is installed.
"""
