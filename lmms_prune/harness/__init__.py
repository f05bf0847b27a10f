"""lmms-eval's side: the entry point, the arguments and the model wrappers."""
