"""What the processes that tests start import first: YAML is parsed by libyaml.

lmms-eval reads two thousand task files whenever it starts, which takes PyYAML's own parser six seconds of a processor
and libyaml's one. What is read is the same.
"""

import contextlib

with contextlib.suppress(ImportError, AttributeError):
    import yaml

    class Loader(yaml.CFullLoader):
        def __init__(self, stream):
            super().__init__(stream)
            # lmms-eval looks for a task's functions beside its file.
            self.name = getattr(stream, "name", "<file>")

    yaml.FullLoader = yaml.loader.FullLoader = Loader
