"""The plugin for lmms-eval: entry point, model arguments and model wrappers."""
