"""Reads all YAML of the package: plain values only, no duplicate keys, and aliases counted before they are expanded."""

from __future__ import annotations

from typing import Any

import yaml

MOST_LETTERS = 200_000
"""Most characters of one text. PyYAML takes seconds to parse that many; real configurations are far shorter."""
MOST_VALUES = 10_000
"""Most values of one text, where each alias counts as all the values that it refers to."""


class YamlError(ValueError):
    """A text that is not valid YAML, or uses YAML that is not allowed here.

    The message names the line and the cause, but not the file.
    """


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys; PyYAML would silently use the last one."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        # A scalar tagged as a mapping or set comes here too; PyYAML reports the error below.
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
    """Reads a task's YAML without importing the functions that the YAML names."""


_TaskLoader.add_constructor("!function", lambda loader, node: str(node.value))


def read_yaml(text: str, *, functions: bool = False) -> Any:
    """Parse a YAML text.

    Args:
        text: one YAML document.
        functions: whether lmms-eval's tag ``!function`` is allowed; its value is the function's name.

    Returns:
        the document's value; None for an empty document.

    Raises:
        YamlError: the text is not valid YAML, is too large, or uses YAML that is not allowed.
    """
    if len(text) > MOST_LETTERS:
        raise YamlError(f"the text has {len(text):,} characters; at most {MOST_LETTERS:,} are allowed.")
    try:
        return _value(text, _TaskLoader if functions else _Loader)
    except yaml.YAMLError as error:
        raise YamlError(_explained(error)) from None
    except YamlError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # PyYAML does not wrap Python's own errors for invalid numbers and dates, or for brackets nested too deeply.
        raise YamlError(f"the text contains a value that cannot be read ({error}).") from None


def _value(text: str, kind: type[_Loader]) -> Any:
    loader = kind(text)
    node = loader.get_single_node()
    if node is None:
        return None
    _count(node)
    return loader.construct_document(node)


def _count(root: yaml.Node) -> None:
    """Refuse a document that its aliases would expand to too many values.

    PyYAML shares the values behind aliases, but code that prints or compares the document visits every copy.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0  # marks a node whose children are being counted
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            # A mapping has pairs (key node, value node); a sequence has nodes.
            children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
            sizes[id(node)] = 1 + sum(map(size, children))
        elif sizes[id(node)] == 0:
            raise YamlError(f"{_location(node.start_mark)}an alias refers to a value that contains the alias itself.")
        if sizes[id(node)] > MOST_VALUES:
            raise YamlError(
                f"{_location(node.start_mark)}more than {MOST_VALUES:,} values, where each alias counts as all the values that "
                "it refers to; use fewer aliases, or write the values out."
            )
        return sizes[id(node)]

    size(root)


def _location(mark: yaml.Mark | None) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _explained(error: yaml.YAMLError) -> str:
    return f"{_location(getattr(error, 'problem_mark', None))}{getattr(error, 'problem', None) or error}."
