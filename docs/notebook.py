"""Makes docs/example.ipynb: ``python docs/notebook.py`` writes and executes it, offline and on a CPU.

The notebook is executed in a new folder with the demo's benchmarks, as `lmms_prune.demo` draws them, and with links to the demo's
weights and to the picture of a form. Paths of this machine, and what is printed to stderr, are not stored.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lmms_prune.demo.benchmarks import mirror_in

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "example.ipynb"
LINKS = ("docs/form.png", "lmms_prune/demo/weights/tiny-llava")


def cells() -> list[Any]:
    """What the notebook says and runs."""
    return [
        new_markdown_cell("""# lmms-prune in a notebook

A schedule, one pruned answer with the tokens that it keeps, and two schedules compared on a benchmark. Everything runs offline on a CPU
with a small model of the demo, which is no evidence about 7B models. [notebook.py](notebook.py) made this file: it draws the demo's
benchmarks into a folder, puts `form.png` and `tiny-llava` beside them, and runs all cells there."""),
        new_markdown_cell("""## A schedule

Before decoder layer 1, DART keeps 44 % of the visual tokens; before layer 9, FastV keeps 10 %."""),
        new_code_cell("""from lmms_prune import Schedule, evaluate, leaderboard, prune, show

schedule = Schedule("dart@1:0.44,fastv@9:0.1")
schedule"""),
        new_code_cell("print(repr(schedule), schedule.plan([144]), float(schedule.avg_visual_tokens(12, [144])))"),
        new_markdown_cell("""## One answer

`prune` works on an unmodified Hugging Face model. The trace says what was kept; in its grids the kept tokens are blue."""),
        new_code_cell("""from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "tiny-llava"  # or a real checkpoint: llava-hf/llava-1.5-7b-hf
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
question = "What is the city mentioned in the document?"
content = [{"type": "image"}, {"type": "text", "text": question}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=Image.open("form.png"), text=prompt, return_tensors="pt")
with prune(model, schedule, seed=0) as trace:
    answer = model.generate(**inputs, max_new_tokens=8)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
trace"""),
        new_code_cell("print(trace.avg_visual_tokens, trace.rows[0].kept)"),
        new_markdown_cell(
            "`show` asks with and without pruning, as an evaluation would, and draws the kept tokens on the image."
        ),
        new_code_cell("""arguments = "dtype=float32,image_aspect=pad"
show("form.png", question, schedule, model="tiny-llava", model_args=arguments)"""),
        new_markdown_cell("""## Two schedules on a benchmark

`evaluate` runs lmms-eval in a process of its own and returns rows of the leaderboard. `none` is the unpruned model, with which the other
two are compared; both keep half of the visual tokens on average."""),
        new_code_cell("""schedules = ["none", "dart@1:?,budget=0.5", "random@1:?,budget=0.5"]
rows = evaluate(
    schedules, "textvqa_val", "results", model="tiny-llava", model_args=f"{arguments},batch_size=8", limit=24
)
rows[["schedule", "avg_visual_tokens", "textvqa_val", "rel", "share_flops"]].round(1)"""),
        new_markdown_cell("""The same from the folder, as `lmms-prune leaderboard results/runs` reads it: the difference to the unpruned run
in points, with its 95 % interval, paired over the documents."""),
        new_code_cell("""board = leaderboard("results/runs").set_index("schedule").filter(like="textvqa_val_difference").round(1)
board.columns = ["difference", "low", "high"]
board"""),
        new_markdown_cell("A wrong schedule is refused before anything runs, and the error points into its text."),
        new_code_cell("""try:
    evaluate("divprune@0:0.5,fastvv@2:0.25", "textvqa_val", "results")
except ValueError as error:
    print(error)"""),
    ]


def executed(folder: Path) -> Any:
    """The notebook with its outputs, executed in `folder`, an empty one."""
    here = mirror_in(folder, 24)
    for link in LINKS:
        (here / Path(link).name).symlink_to(ROOT / link)
    # The kernel and its processes inherit the environment.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "huggingface")}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = new_notebook(cells=cells(), metadata={"kernelspec": kernel})
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(here)}}, record_timing=False).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # by default drawn at random
        if cell.cell_type == "code":
            printed = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [_without_paths(output, {str(folder): "…", str(ROOT): "…"}) for output in printed]
    return notebook


def _without_paths(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return type(value)({key: _without_paths(inner, names) for key, inner in value.items()})
    if isinstance(value, str):
        for path, name in names.items():
            value = value.replace(path, name)
    return value


def texts(notebook: Any) -> Iterator[str]:
    """The text of each cell, and the text outputs of code: what is compared by the test."""
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", ()):
            yield output.get("text") or output.get("data", {}).get("text/plain", output.output_type)


def main() -> None:
    """Write docs/example.ipynb."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(Path(folder).resolve())
    nbformat.validate(notebook)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.relative_to(ROOT)}: {NOTEBOOK.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
