"""The rows of arXiv 2512.07580, Tables 1 and 2, this project's controls, and the paper's schedules for further models.

The source of ``model_configs/``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from lmms_prune.models import Family
from lmms_prune.models.architectures import architecture
from lmms_prune.schedule import Schedule
from lmms_prune.schedule.presets import PRESETS

PAPER = "arXiv 2512.07580"
RANDOM_SEEDS = range(5)
ROW_SEEDS = range(3)  # the authors' scripts run a row that draws at random three times


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables: the settings with which it evaluated one checkpoint.

    Args:
        model: the architecture's name (`lmms_prune.models.architectures`).
        number: the table's number in the paper; of a model that the paper did not evaluate, that of the model whose
            schedules are scaled to its depth.
        tasks: this package's group of the table's benchmarks.
        arguments: further ``model_args`` of every row.
        about: why these arguments are needed; a comment in the files.
        like: of a model that the paper did not evaluate, the architecture whose schedules are scaled to its depth.
    """

    model: str
    number: int
    tasks: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    about: str = ""
    like: str = ""

    @property
    def family(self) -> Family:
        """The model's family; its default checkpoint is the one that the paper evaluated."""
        return architecture(self.model).family

    @property
    def title(self) -> str:
        """The model's name, as papers write it."""
        return f"{self.family.title}-{self.model.rpartition('-')[2].upper()}"

    @property
    def unpruned(self) -> str:
        """The unpruned model's budget: its visual tokens, or all of them where images differ in size."""
        tokens = architecture(self.model).tokens_per_image
        return f"{tokens}t" if tokens else "100%"


_LLAVA_7B, _QWEN_7B, _QWEN2_7B = "llava-1.5-7b", "qwen2.5-vl-7b", "qwen2-vl-7b"
_QWEN3_8B = "qwen3-vl-8b"
_NEXT_7B = "llava-v1.6-vicuna-7b"
TABLES = {
    table.model: table
    for table in (
        PaperTable(
            _LLAVA_7B,
            2,
            "prune_llava",
            {"positions": "compact", "prompt": "vicuna", "image_aspect": "pad"},
            "The paper evaluated LLaVA with renumbered positions, its own prompt, and images padded to squares.",
        ),
        PaperTable(_QWEN_7B, 1, "prune_qwen"),
        PaperTable(_QWEN2_7B, 1, "prune_qwen", like=_QWEN_7B),
        PaperTable(_QWEN3_8B, 1, "prune_qwen", like=_QWEN_7B),
        PaperTable(
            _NEXT_7B,
            2,
            "prune_llava",
            {"unpad": "false"},
            "Papers keep the padding of LLaVA-NeXT's tiles: 2,880 visual tokens of two by two tiles and the base.",
            like=_LLAVA_7B,
        ),
    )
}


@dataclass(frozen=True)
class PaperRow:
    """One configuration: a row of the paper, or a control.

    Args:
        model: a name of `TABLES`.
        name: the row's name; with the model and the budget, it names the file.
        budget: the claimed budget: visual tokens per layer ("192t") or their share ("50%").
        schedule: a preset's name, or the text.
        settings: where the schedule comes from; for a control, its purpose.
        control: whether the row is a control of this project instead of a row of the paper.
        seed: the seed of random draws.
    """

    model: str
    name: str
    budget: str
    schedule: str
    settings: str
    control: bool = False
    seed: int = 0

    @property
    def text(self) -> str:
        """The schedule's text."""
        return PRESETS.get(self.schedule, self.schedule)

    @property
    def stem(self) -> str:
        """The file's name without its ending. It sorts by model, budget and row."""
        size = self.budget.rstrip("t%").zfill(3) + ("pct" if self.budget.endswith("%") else "")
        return f"{self.model}_{size}_{'control-' if self.control else ''}{self.name}"


def _cost(schedule: str) -> str:
    """LLaVA's tokens that a schedule actually keeps, on average, for a comment."""
    return f"{schedule}: {float(Schedule.parse(schedule).avg_visual_tokens(32, [576])):.2f} a layer"


_OURS = "this project's, not the paper's, which did not evaluate this model: Table {table}'s {schedule} for {like}, {scaled}"
_PRINTED = "as Table {table} prints them"
_SCRIPTS = "the counts of the authors' evaluation scripts; Table 5 prints them as {printed}"
_ORDER = "DART's pivots pick in the order of these scripts (order=reference), which keeps other tokens than the default"
_DART = (
    "as Table 5 prints them. "
    + _ORDER.replace("these", "the authors'")
    + ". Its costs in Table 3 were measured with {kept} tokens kept ({cost})"
)
_FASTV = "as Table 5 prints them. Its costs in Table 3 were measured at layer 4 ({cost})"
_VTW = "not stated by the paper: the layer that comes nearest to the budget"
_PDROP = "not stated by the paper: its authors' rule for low budgets, which keeps λ, λ² and λ³ from layers 2, 8 and 16"
_SPARSEVLM = (
    "not stated by the paper: the lists of its authors' code (v1.5), which meet the budget by their own accounting, "
    "in which a layer counts as pruned before it has run, and recycled tokens do not count"
)

# Row, schedule, settings; {} is the budget.
_LLAVA = {
    "192": (
        ("pdrop", "pdrop-192", _PDROP),
        ("sparsevlm", "sparsevlm-192", _SPARSEVLM),
        ("vtw", "vtw-192", _VTW),
        ("fastv", "fastv-192", _FASTV.format(cost=_cost("fastv@4:148t"))),
        ("dart", "dart-192-release", _DART.format(kept=172, cost=_cost("dart@2:168t"))),
        ("divprune", "divprune-192", _PRINTED.format(table=5)),
        ("fastv+vtw", "fastv+vtw-192", _PRINTED.format(table=5)),
        ("dart+vtw", "dart+vtw-192-release", f"{_SCRIPTS}. {_ORDER}"),
        ("divprune+vtw", "divprune+vtw-192-release", _SCRIPTS + ", whose layer is taken (the scripts say 20)"),
        ("fastv+random", "fastv+random-192", _PRINTED.format(table=5)),
        ("dart+random", "dart+random-192-release", f"{_SCRIPTS}. {_ORDER}"),
        ("divprune+random", "divprune+random-192-release", _SCRIPTS),
    ),
    "64": (
        ("pdrop", "pdrop-64", _PDROP),
        ("sparsevlm", "sparsevlm-64", _SPARSEVLM),
        ("vtw", "vtw-64", _VTW),
        ("fastv", "fastv-64", _FASTV.format(cost=_cost("fastv@4:11t"))),
        ("dart", "dart-64-release", _DART.format(kept=36, cost=_cost("dart@2:32t"))),
        ("divprune", "divprune-64", _PRINTED.format(table=5)),
        ("fastv+vtw", "fastv+vtw-64", _PRINTED.format(table=5)),
        ("dart+vtw", "dart+vtw-64-release", f"{_SCRIPTS}. {_ORDER}"),
        ("divprune+vtw", "divprune+vtw-64-release", _SCRIPTS),
        ("fastv+random", "fastv+random-64", _PRINTED.format(table=5)),
        ("dart+random", "dart+random-64-release", f"{_SCRIPTS}. {_ORDER}"),
        ("divprune+random", "divprune+random-64-release", _SCRIPTS),
    ),
}
_SHARES = {"192": "33%", "64": "11%"}
"""LLaVA-1.5's budgets as shares of 576 tokens, for a model whose images differ in size."""
_ALIKE = tuple(f"{method}{second}" for second in ("", "+vtw", "+random") for method in ("fastv", "dart", "divprune"))
_QWEN = ("dart", "divprune", "dart+vtw", "divprune+vtw", "dart+random", "divprune+random")

# The controls' keeps; all act before the decoder. Pooling and downsampling keep whole grids: of 24 x 24 tokens, 14 x 14,
# which is nearest to 192. For Qwen2.5-VL, whose images differ in size, they keep the largest grid within the share.
_CONTROLS = {
    (_LLAVA_7B, "192t"): {"random": "192t", "stride": "192t", "pool": "196t", "downsample": "196t"},
    (_LLAVA_7B, "64t"): {"random": "64t", "stride": "64t", "pool": "64t", "downsample": "64t"},
    (_QWEN_7B, "50%"): {"random": "0.5", "stride": "0.5", "pool": "0.5", "downsample": "0.5"},
    (_QWEN2_7B, "50%"): {"random": "0.5", "stride": "0.5", "pool": "0.5", "downsample": "0.5"},
    (_QWEN3_8B, "50%"): {"random": "0.5", "stride": "0.5", "pool": "0.5", "downsample": "0.5"},
    (_NEXT_7B, "33%"): {"random": "0.33", "stride": "0.33", "pool": "0.33"},
    (_NEXT_7B, "11%"): {"random": "0.11", "stride": "0.11", "pool": "0.11"},
}
_ABOUT = {
    "random": "a control: tokens drawn at random, before the decoder, at the rows' budget. Seeds 0 to 4 are five files",
    "stride": "a control: tokens at even distances, before the decoder, at the rows' budget",
    "pool": "a control: tokens averaged to a coarser grid, before the decoder, at the rows' budget",
    "downsample": "a control: the image itself made smaller, at the rows' budget",
}


def _scaled(table: PaperTable, name: str, preset: str = "{}-50pct", budget: str = "50%", printed: int = 4) -> PaperRow:
    """A row of the paper, by default at half of the tokens, for a model that the paper did not evaluate.

    Args:
        table: of the model.
        name: of the row.
        preset: the row's schedule; {} is its name.
        budget: the share of the tokens.
        printed: the paper's table that prints the schedule.
    """
    of, layers = (architecture(model).layers for model in (table.like, table.model))
    schedule = Schedule.parse(PRESETS[preset.format(name)])
    stages = (replace(stage, layer=round(stage.layer * layers / of)) for stage in schedule.stages)
    scaled = f"as deep: {layers} layers" if layers == of else f"its layers scaled from {of} to {layers}"
    settings = _OURS.format(table=printed, schedule=schedule, like=TABLES[table.like].title, scaled=scaled)
    return PaperRow(table.model, name, budget, str(Schedule(tuple(stages))), settings)


def _rows() -> Iterator[PaperRow]:
    """All rows and controls of all models."""
    for name, table in TABLES.items():
        settings = "the unpruned model, which every other row is compared with"
        yield PaperRow(name, "unpruned", table.unpruned, "none", settings)
        zero = "0" + table.unpruned[-1]
        yield PaperRow(name, "blind", zero, "blind@0", "a control: no image at all, what the text alone gives", True)
    for budget, rows in _LLAVA.items():
        for name, preset, settings in rows:
            printed = PRESETS[preset.removesuffix("-release")]
            yield from _seeded(PaperRow(_LLAVA_7B, name, f"{budget}t", preset, settings.format(printed=printed)))
    for name in _QWEN:
        yield from _seeded(PaperRow(_QWEN_7B, name, "50%", f"{name}-50pct", _PRINTED.format(table=4)))
    for table in TABLES.values():
        for name in _QWEN if table.like == _QWEN_7B else ():
            yield from _seeded(_scaled(table, name))
        for tokens, budget in _SHARES.items() if table.like == _LLAVA_7B else ():
            for name in _ALIKE:
                yield from _seeded(_scaled(table, name, f"{{}}-{tokens}", budget, 5))
    for (model_name, budget), keeps in _CONTROLS.items():
        for method, keep in keeps.items():
            schedule, about = f"{method}@0:{keep}", _ABOUT[method]
            if method != "random":
                yield PaperRow(model_name, method, budget, schedule, about, True)
                continue
            for seed in RANDOM_SEEDS:
                yield PaperRow(model_name, f"random-{seed}", budget, schedule, about, True, seed)


def _seeded(row: PaperRow) -> Iterator[PaperRow]:
    """The row, once for each seed if it draws at random."""
    if not any(stage.method == "random" for stage in Schedule.parse(row.text).stages):
        yield row
        return
    settings = f"{row.settings}. It draws at random: seeds 0 to {ROW_SEEDS[-1]} are {len(ROW_SEEDS)} files"
    for seed in ROW_SEEDS:
        yield replace(row, name=f"{row.name}-{seed}", settings=settings, seed=seed)


ROWS: dict[str, PaperRow] = {row.stem: row for row in sorted(_rows(), key=lambda row: row.stem)}
"""Every configuration by its file's stem, in the files' order."""
