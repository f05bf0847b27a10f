"""The README and docs/: their links, tables, names and code agree with the package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import lmms_prune
from lmms_prune.cli import markdown_table
from lmms_prune.methods import METHODS
from lmms_prune.models import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def text_of(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> Iterator[tuple[str, Path, str]]:
    """The relative links of a page: text, the file it points to, anchor."""
    for text, target in re.findall(r"\[((?:\\.|[^\]\\])*)\]\(([^)\s]+)\)", text_of(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield text.replace("\\", ""), (page.parent / path if path else page).resolve(), anchor


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(page: Path, head: str) -> Iterator[list[str]]:
    """The rows of the table that begins with the line `head`, those of groups left out."""
    _, _, after = page.read_text(encoding="utf-8").partition(head + "\n")
    assert after, f"{page.name} has no table with the line {head}"
    for line in after.splitlines()[1:]:
        if not line.startswith("|"):
            return
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("| ").split(" | ")]


@each_page
def test_every_relative_link_resolves(page: Path) -> None:
    for text, target, anchor in links(page):
        assert target.exists(), f"[{text}] points to {target.relative_to(ROOT)}, which does not exist"
        assert not anchor or anchor in anchors(target), f"[{text}]: {target.name} has no heading #{anchor}"


def test_every_picture_of_the_docs_is_shown_or_used() -> None:
    """A picture that no page names goes stale unseen."""
    texts = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.png")}
    assert {name for name in names if name not in texts} == set()


@each_page
def test_a_link_that_names_a_file_points_to_that_file(page: Path) -> None:
    """A file that is renamed leaves a link that resolves and a text that is wrong."""
    for text, target, _ in links(page):
        if re.fullmatch(r"[\w./-]+\.\w+|[\w./-]+/", text):
            assert target.as_posix().endswith(f"/{text.rstrip('/').removeprefix('../')}"), f"[{text}] is {target.name}"


@each_page
def test_names_that_are_said_to_be_in_a_file_are_there(page: Path) -> None:
    for names, target in re.findall(r"((?:`\w+`(?:, | and )?)+) in \[[^\]]*\]\(([^)]+\.py)\)", text_of(page)):
        code = (page.parent / target).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", code), f"`{name}` is not in {target}"


def test_tests_and_files_that_pages_name_exist() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"(?<![\w/])test_\w+(?=`)", text):
            assert f"def {name}(" in tests, f"{page.name} names {name}, which is no test"
        for path in re.findall(r"`((?:lmms_prune|tests|docs)/[\w./]+\.\w+)`", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}, which does not exist"


def test_the_readmes_table_of_methods_is_the_one_that_is_printed() -> None:
    message = "paste what `lmms-prune methods --markdown` prints"
    assert f"\n{markdown_table()}\n\n" in (ROOT / "README.md").read_text(encoding="utf-8"), message


def test_the_long_table_of_methods_has_a_row_for_every_method() -> None:
    """Kind, layers, keeps, paper and file as METHODS has them."""
    page = ROOT / "docs" / "methods.md"
    head = "| method | chooses by | kind | acts at layers | keeps | paper | file | checked against |"
    found = {cells[0].strip("`"): cells for cells in rows(page, head)}
    assert set(found) == set(METHODS)
    for name, (_, chooses, kind, layers, keeps, paper, file, checked) in found.items():
        spec = METHODS[name]
        assert kind == spec.kind + (", rewrites" if spec.rewrites and spec.kind != "merging" else "")
        deepest = "any" if spec.highest_layer is None else str(spec.highest_layer)
        assert layers == (f"≥ {spec.lowest_layer}" if spec.lowest_layer else deepest)
        assert ("adaptive" in keeps) == (spec.keep == "optional")
        assert paper == f"[{spec.paper.rsplit('/', 1)[1]}]({spec.paper})"
        assert file == f"[{name}.py](../lmms_prune/methods/{name}.py)"
        assert chooses
        assert checked


def test_the_readmes_table_of_models_has_a_row_for_every_family() -> None:
    head = "| `--model` | architecture | checkpoints | batches | eager, SDPA | FlashAttention 2 and 3 | `positions=compact` |"
    found = {cells[0].strip("`"): cells for cells in rows(ROOT / "README.md", head)}
    assert set(found) == {family.model_name for family in FAMILIES.values()}
    for family in FAMILIES.values():
        cells = found[family.model_name]
        assert cells[1] == family.title
        assert cells[-1].startswith("yes" if family.renumbers else "no")


def test_the_readmes_lines_of_python_print_what_their_comments_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    expected = [line.rsplit("  # ", 1)[1] for line in code.splitlines() if line.startswith("print(")]
    assert expected
    assert capsys.readouterr().out.splitlines() == expected


def test_citation_and_changelog_are_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == lmms_prune.__version__
    assert cited["license"] == "Apache-2.0"
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == lmms_prune.__version__


def test_the_image_is_built_from_files_that_exist_by_the_readmes_command() -> None:
    """It is not built here: what can be known of it without doing so."""
    text = (ROOT / "docs" / "docker" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    steps = [(word, rest.split()) for word, rest in lines]
    [(_, [base])] = [step for step in steps if step[0] == "FROM"]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu\d+\.\d+", base)
    copied = {name for word, names in steps if word == "COPY" for name in names[:-1]}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"], *wheel["packages"]}
    assert needed | {*wheel["force-include"], "constraints.txt"} == copied
    [installed] = [" ".join(words) for word, words in steps if word == "RUN" and words[:2] == ["pip", "install"]]
    assert f"```bash\n{installed} && lmms-prune demo\n```" in (ROOT / "README.md").read_text(encoding="utf-8")
    words = [word for word, _ in steps]
    assert dict(steps)["USER"] != ["root"]
    assert "RUN" not in words[words.index("USER") :]
    assert steps[-1] == ("ENTRYPOINT", ['["lmms-eval"]'])
    for option, value in (("--model", "llava_pruned"), ("--tasks", "textvqa_val"), ("--output_path", "results")):
        assert re.search(rf"^#.*{option} {value}\b", text, re.MULTILINE)


def test_contributors_install_as_the_readme_says() -> None:
    [line] = re.findall(
        r"^pip install .*(?= && pytest)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert f"\n{line}\n" in (ROOT / "docs" / "CONTRIBUTING.md").read_text(encoding="utf-8")
