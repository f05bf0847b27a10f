"""The ``--config`` files of lmms-eval: one for each published row, written from a table, and checked without torch."""
