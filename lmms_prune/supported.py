"""What is supported, known before torch is imported: the model families, and the versions of the libraries around us."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

# The wheel of lmms-eval 0.7.2 and those before lack the files that most tasks include, so that they run none of them.
VERSIONS = {"transformers": ">=5.17,<6", "lmms-eval": ">=0.7.3,<0.8"}
"""By the package's name, as in pyproject.toml: the hooks reach into the first, the models implement the second's interface."""


class UnsupportedVersionError(ImportError):
    """A library of a version with which a wrong number could follow; the message says which versions will do."""


def refuse_other_versions(supported: Mapping[str, str] = VERSIONS) -> None:
    """Refuse what is installed of the packages in `supported` if its version is another.

    Raises:
        UnsupportedVersionError: names the package, its version, and the range.
    """
    for name, allowed in supported.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue  # whoever needs it will say so, and a schedule can be read without
        if not SpecifierSet(allowed).contains(found, prereleases=True):
            raise UnsupportedVersionError(
                f"lmms_prune: {name} {found} is installed, which is not supported; use one of {allowed}: "
                f"pip install '{name}{allowed}'"
            )


@dataclass(frozen=True)
class Supported:
    """One model architecture.

    Args:
        model_type: the checkpoint's ``config.model_type``.
        model_name: the name under which lmms-eval finds it.
        default: the checkpoint that is loaded when none is named.
        mrope: whether positions have three channels, which renumbering would destroy.
    """

    model_type: str
    model_name: str
    default: str
    mrope: bool


SUPPORTED: tuple[Supported, ...] = (
    Supported("llava", "llava_pruned", "llava-hf/llava-1.5-7b-hf", mrope=False),
    Supported("qwen2_5_vl", "qwen2_5_vl_pruned", "Qwen/Qwen2.5-VL-7B-Instruct", mrope=True),
)
