"""Writes and checks ``--config`` files of lmms-eval, without torch. There is one file for each row of the paper's tables."""
