"""The jobs of a sweep, their order, and the configurations that a sweep refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweeps import TINY, config

from lmms_prune.harness.tasks import own_groups, task_configs
from lmms_prune.sweep.jobs import SweepError, plan


def test_a_job_is_one_task_of_one_configuration(tmp_path: Path) -> None:
    config(tmp_path, "b", "none")
    config(tmp_path, "a", "vtw@5", tasks="prune_llava,mme")
    jobs = plan([tmp_path], tmp_path / "out")
    group = [*own_groups()["prune_llava"]]
    assert [(job.name, job.task) for job in jobs] == [
        *(("a", task) for task in group),
        ("b", "pope"),
        ("b", "ocrbench"),
    ]
    (job, *_) = jobs
    assert job.folder == tmp_path / "out" / "a" / "mme"
    assert job.settings["tasks"] == "mme"
    assert job.settings["output_path"] == str(job.folder)
    assert job.settings["include_path"] == str(task_configs())
    assert job.settings["log_samples"] is True
    assert "," not in str(job.partial).removeprefix(str(tmp_path))


@pytest.mark.parametrize("named", ["mine.py:Mine", "parts.mine:Mine"])
def test_a_job_is_another_one_when_the_file_of_its_method_changes(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise `sweep` and `horizon` would show an older idea's score as the new one's. Planning imports nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "parts"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    inputs = []
    for content in ("raise SystemExit('imported')", "raise SystemExit('imported again')"):
        for folder in (tmp_path, package):
            (folder / "mine.py").write_text(content, encoding="utf-8")
        [job] = plan([config(tmp_path, "a", f"{named}@2:0.3", tasks="pope")], tmp_path / "out")
        inputs.append({Path(file).name: size for file, (size, _) in job.inputs.items()})
    assert [sizes["mine.py"] for sizes in inputs] == [28, 34]


def test_configurations_that_share_weights_follow_each_other(tmp_path: Path) -> None:
    for name, dtype in (("a", "float32"), ("b", "bfloat16"), ("c", "float32"), ("d", "bfloat16")):
        config(tmp_path, name, "none", tasks="pope", dtype=dtype, seed=ord(name))
    assert [job.name for job in plan([tmp_path], tmp_path)] == ["a", "c", "b", "d"]


def test_shards_are_all_configurations_once(tmp_path: Path) -> None:
    for name in "abcde":
        config(tmp_path, name, "none")
    every_job = plan([tmp_path], tmp_path)
    parts = [plan([tmp_path], tmp_path, shard=f"{part}/3") for part in (1, 2, 3)]
    assert sorted(map(str, (job for part in parts for job in part))) == sorted(map(str, every_job))
    # A job's own shard is its configuration alone.
    for job in every_job:
        assert {planned.name for planned in plan([tmp_path], tmp_path, shard=job.part)} == {job.name}


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3"])
def test_a_wrong_shard_is_refused(shard: str, tmp_path: Path) -> None:
    config(tmp_path, "a", "none")
    with pytest.raises(SweepError, match=f"--shard {shard}: write the part and the number of parts"):
        plan([tmp_path], tmp_path, shard=shard)


def test_the_commands_options_override_the_files(tmp_path: Path) -> None:
    path = config(tmp_path, "a", "none")
    path.write_text(path.read_text(encoding="utf-8") + "limit: 7\noutput_path: elsewhere\n", encoding="utf-8")
    assert {job.settings["limit"] for job in plan([path], tmp_path)} == {7}
    (job,) = plan([path], tmp_path / "out", tasks="mme", limit=2)
    assert (job.task, job.settings["limit"], job.folder) == ("mme", 2, tmp_path / "out" / "a" / "mme")


def test_a_files_own_task_folder_is_kept(tmp_path: Path) -> None:
    path = config(tmp_path, "a", "none")
    path.write_text(path.read_text(encoding="utf-8") + f"include_path: {tmp_path}\n", encoding="utf-8")
    assert {str(job.settings["include_path"]) for job in plan([path], tmp_path)} == {
        str([str(tmp_path), str(task_configs())])
    }


def test_every_mistake_of_every_file_is_reported_before_anything_runs(tmp_path: Path) -> None:
    config(tmp_path, "a", "drat@2:0.5")
    config(tmp_path, "b", "random@12:0.5")
    path = config(tmp_path, "c", "none")
    path.write_text(path.read_text(encoding="utf-8") + "env: {A: 1}\nuse_cache: here\n", encoding="utf-8")
    with pytest.raises(SweepError) as caught:
        plan([tmp_path], tmp_path / "out")
    message = str(caught.value)
    assert "a.yaml: schedule: unknown method 'drat'" in message
    assert "b.yaml: schedule: layer 12 in stage 1 is beyond the model" in message
    assert "c.yaml: env: the runs share a process" in message
    assert "c.yaml: use_cache: a sweep skips what is complete" in message
    assert not (tmp_path / "out").exists()


def test_commas_at_which_the_harness_would_cut_are_refused(tmp_path: Path) -> None:
    path = config(tmp_path, "dart,random", "none")
    with pytest.raises(SweepError, match="splits paths at commas, and results go to a folder of this name; rename it"):
        plan([path], tmp_path)
    with pytest.raises(SweepError, match="--out a,b: lmms-eval splits paths at commas"):
        plan([config(tmp_path, "a", "none")], Path("a,b"))


def test_two_configurations_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [config(tmp_path, "a", "none"), config(tmp_path / "other", "a", "vtw@5")]
    with pytest.raises(SweepError, match="would share the folder 'a'; rename one of them"):
        plan(paths, tmp_path)


def test_runs_of_a_list_have_numbers(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    run = f"{{model: llava_pruned, model_args: 'pretrained={TINY},schedule=vtw@%d', tasks: pope}}"
    path.write_text(f"- {run % 3}\n- {run % 4}\n", encoding="utf-8")
    assert [job.name for job in plan([path], tmp_path)] == ["both-1", "both-2"]
