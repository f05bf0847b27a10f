"""A board of packs: rows as one file each, and boards of several groups merged into one."""
