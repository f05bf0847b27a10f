"""Private names of other libraries that this package uses: one module per library, with the tested versions.

Libraries rename such names within weeks. Every name that has ever moved is looked up here, so that a move is fixed in one
line. Every name is listed in a table, which a test and ``lmms-prune doctor --installation`` compare with the installed
version.
"""
