"""The one reader of YAML: plain values only, keys once, and aliases counted before they are expanded."""

from __future__ import annotations

from typing import Any

import yaml

MOST_LETTERS = 200_000
"""Of one text: PyYAML takes seconds for as many, and no configuration comes near."""
MOST_VALUES = 10_000
"""Of one text, each alias counted as all that it stands for."""


class YamlError(ValueError):
    """A text that is no YAML, or none that is read here; the message says where and why, without the file's name."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        # A scalar may claim to be a set: then PyYAML names it.
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key))
        return super().construct_mapping(node, deep)  # type: ignore[arg-type]


class _TaskLoader(_Loader):
    """Reads a task's YAML without importing the functions that it names."""


_TaskLoader.add_constructor("!function", lambda loader, node: str(node.value))


def read_yaml(text: str, *, functions: bool = False) -> Any:
    """The value of a YAML text.

    Args:
        text: of one document.
        functions: whether lmms-eval's tag ``!function`` may stand in it; it becomes the function's name.

    Raises:
        YamlError: see there.
    """
    if len(text) > MOST_LETTERS:
        raise YamlError(f"it has {len(text):,} letters; at most {MOST_LETTERS:,} are read.")
    try:
        return _value(text, _TaskLoader if functions else _Loader)
    except yaml.YAMLError as error:
        raise YamlError(_explained(error)) from None
    except YamlError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # PyYAML lets pass whatever Python says of numbers and dates that are none, or of too many brackets.
        raise YamlError(f"it holds a value that cannot be read ({error}).") from None


def _value(text: str, kind: type[_Loader]) -> Any:
    loader = kind(text)
    node = loader.get_single_node()
    if node is None:
        return None
    _count(node)
    return loader.construct_document(node)


def _count(root: yaml.Node) -> None:
    """Refuse what aliases would blow up. PyYAML shares what they stand for; whoever prints or compares it does not."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0  # inside itself
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            inside = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
            sizes[id(node)] = 1 + sum(map(size, inside))
        elif sizes[id(node)] == 0:
            raise YamlError(f"{_place(node.start_mark)}an alias stands inside of what it stands for.")
        if sizes[id(node)] > MOST_VALUES:
            raise YamlError(
                f"{_place(node.start_mark)}more than {MOST_VALUES:,} values, each alias counted as all that it stands for; "
                "write out what is meant."
            )
        return sizes[id(node)]

    size(root)


def _place(mark: yaml.Mark | None) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _explained(error: yaml.YAMLError) -> str:
    return f"{_place(getattr(error, 'problem_mark', None))}{getattr(error, 'problem', None) or error}."
