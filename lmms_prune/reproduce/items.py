"""The items of arXiv 2512.07580 that can be reproduced: its Tables 1 to 3 and Figures 1, 2 and 5 to 12."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lmms_prune.configs.table import TABLES
from lmms_prune.errors import did_you_mean
from lmms_prune.models.architectures import architecture

Kind = Literal["scores", "costs", "methods", "kept", "oracle", "variance", "vanishing", "horizons"]

GENERAL = ("MME", "SQA", "POPE")
READING = ("TextVQA", "OCRBench", "OCRVQA")
"""The six benchmarks of Figure 9. The first three ask about what is there, the others about written text."""
LEAST_LAYERS = 6
"""Decoder layers that a model needs: the paper's shallow, middle and deep layers must differ when scaled to it."""

_REPOSITORY = "README of the authors' code (YahongWang1/Information-Horizon)"


class ReproduceError(ValueError):
    """An item, model or option with which nothing can be reproduced; the message says what to change."""


@dataclass(frozen=True)
class Item:
    """One table or figure of the paper.

    Args:
        name: as on the command line.
        kind: what it shows, which decides its steps and claims.
        title: what it shows, in words.
        tables: the numbers of the paper's tables whose models it is about: 1 is Qwen2.5-VL-7B, 2 LLaVA-1.5-7B.
        columns: benchmarks of a figure, by the names of the tables' columns; of a table, its own.
        keeps: numbers or shares of tokens that are kept, for the paper's models.
        documents: documents of each benchmark that are drawn; None for all.
        source: where the settings come from.
    """

    name: str
    kind: Kind
    title: str
    tables: tuple[int, ...]
    columns: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    documents: int | None = None
    source: str = ""


_OWN = "Benchmarks, keeps and the number of documents are this project's choice: the caption was not available to it."
_DRAWN = "Keeps and the number of drawn documents are the paper's; "

ITEMS: dict[str, Item] = {
    item.name: item
    for item in (
        Item("table1", "scores", "scores at half of the visual tokens", (1,)),
        Item("table2", "scores", "scores at 192 and 64 visual tokens a layer", (2,)),
        Item("table3", "costs", "FLOPs, cache, time and accuracy on TextVQA", (2,), ("TextVQA",), documents=200),
        Item(
            "fig1",
            "methods",
            "score of each method as the only stage, by its layer",
            (2,),
            ("TextVQA",),
            keeps=("60t", "148t"),
            documents=1000,
            source=_OWN,
        ),
        Item(
            "fig2",
            "methods",
            "the same on further benchmarks",
            (2,),
            ("MME", "POPE", "TextVQA"),
            keeps=("60t", "148t"),
            documents=1000,
            source=_OWN,
        ),
        Item(
            "fig5",
            "kept",
            "information that each method keeps, by layer",
            (2,),
            ("MME",),
            keeps=("60t", "148t", "292t"),
            documents=200,
            source=_DRAWN + "which methods it compares is this project's choice.",
        ),
        Item(
            "fig6",
            "oracle",
            "score when the tokens of the highest information are kept",
            (2,),
            ("MME", "TextVQA"),
            keeps=("144t", "72t"),
            documents=200,
            source=f"Keeps and benchmarks are those of the authors' code ({_REPOSITORY}: Figure 6); 200 drawn documents.",
        ),
        Item(
            "fig7",
            "variance",
            "variance of information over tokens, and heat maps",
            (2,),
            ("MME", "TextVQA"),
            documents=200,
            source="Benchmarks and the number of documents are this project's choice.",
        ),
        Item(
            "fig8",
            "vanishing",
            "mean information and the score without visual tokens",
            (2,),
            (*GENERAL, "TextVQA"),
            documents=1000,
            source="Scores of 1000 drawn documents, information of 200 of them: this project's choice.",
        ),
        Item(
            "fig9",
            "horizons",
            "the information horizon of six benchmarks",
            (1, 2),
            (*GENERAL, *READING),
            documents=1000,
            source="Scores of 1000 drawn documents, information of 200 of them: this project's choice.",
        ),
        Item(
            "fig10",
            "methods",
            "Figures 1 and 2 for the other model",
            (1,),
            ("MME", "TextVQA"),
            keeps=("0.25", "0.5"),
            documents=1000,
            source=_OWN,
        ),
        Item(
            "fig11",
            "oracle",
            "Figure 6 for the other model",
            (1,),
            ("MME", "TextVQA"),
            keeps=("0.5", "0.25"),
            documents=200,
            source="Of the paper's four keeps (75, 50, 25 and 12.5 %) two, on 200 drawn documents.",
        ),
        Item(
            "fig12",
            "kept",
            "Figure 5 for the other model",
            (1,),
            ("MME", "TextVQA"),
            keeps=("0.5", "0.25"),
            documents=1000,
            source=_DRAWN + "which methods it compares is this project's choice.",
        ),
    )
}


def chosen_items(names: Sequence[str]) -> list[Item]:
    """The items of some names in the paper's order; ``all`` is every item.

    Raises:
        ReproduceError: there is no such item.
    """
    for name in names:
        if name != "all" and name not in ITEMS:
            hint = did_you_mean(name, ["all", *ITEMS])
            raise ReproduceError(
                f"there is no item '{name}'.{hint} Items are all, {', '.join(ITEMS)}. Tables 4 and 5 are the schedules of Tables 1 "
                "and 2; Figures 3 and 4 are drawings without measurements."
            )
    return [item for item in ITEMS.values() if "all" in names or item.name in names]


def paper_models() -> dict[str, str]:
    """The paper's models by the first letters of their names: architecture names of `TABLES`."""
    own = [table for table in TABLES.values() if not table.like]
    return {"".join(letter for letter in table.model.split("-")[0] if letter.isalpha()): table.model for table in own}


def refuse_shallow(items: Iterable[Item], model: str, layers: int) -> None:
    """Refuse a model without the layers that the items need.

    Raises:
        ReproduceError: names the first item.
    """
    for item in items:
        if layers < LEAST_LAYERS:
            likes = ", ".join(str(architecture(name).layers) for name in paper_models().values())
            raise ReproduceError(
                f"{item.name}: {model} has {layers} decoder layers, and the paper's depths (of {likes} layers) scaled to it need at "
                f"least {LEAST_LAYERS}."
            )
