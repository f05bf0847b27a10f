"""The classes of all commands: their help is plain, and an option under its former name is refused with the present one."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from typer.core import TyperCommand, TyperGroup

from lmms_prune.terminal.console import fail

# Former spellings of options, by which older notes and scripts call them.
RENAMED = {
    "--batch": "--batch-size",
    "--folder": "--out",
    "--include_path": "--include-path",
    "--model_args": "--model-args",
    "--samples": "--limit",
    "--task": "--tasks",
}


def without_types_of_flags(params: list[Any]) -> list[Any]:
    """Return a command's parameters; help shows no type for those that take no value, where typer would write ``<bool>``."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


class Command(TyperCommand):
    """A command whose help wraps at the width of the terminal, not where its docstring does."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        paragraphs = cleandoc(self.help or "").split("\n\n")
        self.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, that of ``--help`` included."""
        return without_types_of_flags(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words after the command's name."""
        known = {name for param in self.get_params(ctx) for name in param.opts}
        # What follows "--" is no option of this command.
        own = args[: args.index("--")] if "--" in args else args
        for option in (word.partition("=")[0] for word in own):
            if option in RENAMED and option not in known and RENAMED[option] in known:
                fail(f"{ctx.info_name} {option}: the option is called {RENAMED[option]}.")
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """A group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, that of ``--help`` included."""
        return without_types_of_flags(super().get_params(ctx))
