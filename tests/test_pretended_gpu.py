"""Every method on a pretended GPU: the answers of the CPU, no tensor on a wrong device, and the host hardly ever waits.

On a machine with a GPU the same generations run on it, with torch's own watch for waits in the stages.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import Family, noise
from torch import Tensor

from lmms_prune import Schedule, prune
from lmms_prune.bench.pretended import GPU, PretendedGpu, PretendedTensor, WrongDeviceError, on_cpu
from lmms_prune.bench.waits import Counted, Work, count
from lmms_prune.methods import METHODS, MethodSpec
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts

READY = [spec for spec in METHODS.values() if spec.ready]
QUESTIONS = ["What is it?", "", "How many cups stand on the table by the window?", "Left or right?"]
SIZES = [(112, 112), (112, 84), (140, 112), (84, 112)]
NEW = 3
# At most this many waits in a prefill, in a stage, and in a decode step.
PREFILL, STAGE, STEP = 4, 1, 0


def single(spec: MethodSpec) -> str:
    """A schedule with the method's example, at a layer that a small model has."""
    stage = Schedule.parse(spec.example).stages[0]
    layer = min(max(spec.lowest_layer, 1), 1 if spec.highest_layer is None else spec.highest_layer)
    options = "".join(f";{name}={value}" for name, value in dict(stage.options).items())
    return f"{spec.name}@{layer}{'' if spec.drops_all else ':0.3'}{options}"


SCHEDULES = [*map(single, READY), "dart@2:0.44,random@6:0.07", "sparsevlm@2:0.6,sparsevlm@4:0.3", "random@1:1"]


def batch(family: Family, rows: int) -> dict[str, Tensor]:
    """Rows of different texts and, where a family's images may differ, sizes."""
    questions = [QUESTIONS[i % 4] for i in range(rows)]
    return family.inputs(questions, [[noise(i, *SIZES[i % 4])] for i in range(rows)])


def generate(family: Family, inputs: Mapping[str, Tensor], schedule: str) -> tuple[Any, Any]:
    rows = len(inputs["input_ids"])
    with torch.no_grad(), prune(family.model, schedule, questions=[QUESTIONS[i % 4] for i in range(rows)]) as trace:
        answer = family.model.generate(
            **inputs,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return answer, trace


def on_pretended_gpu(family: Family, inputs: Mapping[str, Tensor], schedule: str, **options: Any) -> Counted:
    rows = len(inputs["input_ids"])
    questions = [QUESTIONS[i % 4] for i in range(rows)]
    return count(family.model, inputs, schedule, new_tokens=NEW, questions=questions, **options)


def assert_equal(counted: Counted, answer: Any, trace: Any) -> None:
    assert torch.equal(counted.sequences, answer.sequences)
    torch.testing.assert_close(counted.logits, torch.stack(list(answer.logits)), rtol=0, atol=0)
    for ours, theirs in zip(counted.trace.rows, trace.rows, strict=True):
        assert (ours.kept, ours.recycled, ours.computed, ours.cached) == (
            theirs.kept,
            theirs.recycled,
            theirs.computed,
            theirs.cached,
        )
        for ours_masks, their_masks in zip(ours.masks, theirs.masks, strict=True):
            assert all(map(torch.equal, ours_masks, their_masks))


def assert_waits(counted: Counted) -> None:
    def lines(work: Work) -> str:
        return "\n".join(f"{times} x {reason}: {line}" for (reason, line), times in work.waits.items())

    assert counted.step.waited <= STEP, f"a decode step waits:\n{lines(counted.step)}"
    for layer, work in counted.stages.items():
        assert work.waited <= STAGE, f"the stage at layer {layer} waits:\n{lines(work)}"
    assert counted.prefill.waited <= PREFILL, f"the prefill waits:\n{lines(counted.prefill)}"


@pytest.fixture(params=["llava", "qwen"])
def small(request: pytest.FixtureRequest, loaded: Callable[..., Family]) -> Family:
    return loaded(request.param, torch.float32)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pretended_gpu_answers_as_the_cpu_and_hardly_waits(small: Family, schedule: str, rows: int) -> None:
    inputs = batch(small, rows)
    counted = on_pretended_gpu(small, inputs, schedule)
    assert_equal(counted, *generate(small, inputs, schedule))
    assert_waits(counted)


@pytest.mark.parametrize("schedule", [*(single(spec) for spec in READY if "encoder" in spec.reads), SCHEDULES[-3]])
def test_so_does_one_whose_vision_encoder_has_no_windows(loaded: Callable[..., Family], schedule: str) -> None:
    """Qwen2-VL: its decoder is Qwen2.5-VL's, so the methods that read the encoder are tried, and one mix."""
    small = loaded("qwen2", torch.float32)
    inputs = batch(small, 8)
    counted = on_pretended_gpu(small, inputs, schedule)
    assert_equal(counted, *generate(small, inputs, schedule))
    assert_waits(counted)


@pytest.mark.parametrize("schedule", [*(single(spec) for spec in READY if spec.rewrites), SCHEDULES[-3]])
def test_so_does_one_that_adds_features_between_its_layers(loaded: Callable[..., Family], schedule: str) -> None:
    """Qwen3-VL: the methods that rewrite tokens take along what is still to be added, and one mix cuts it."""
    small = loaded("qwen3", torch.float32)
    inputs = batch(small, 8)
    counted = on_pretended_gpu(small, inputs, schedule)
    assert_equal(counted, *generate(small, inputs, schedule))
    assert_waits(counted)


@pytest.mark.parametrize(
    "schedule",
    [
        *(single(spec) for spec in READY if {"encoder", "grid"} & set(spec.reads)),
        "vispruner@0:0.5;per=tile,dart@2:0.3,pool@5:0.2",
    ],
)
def test_so_does_one_whose_images_are_in_tiles(loaded: Callable[..., Family], schedule: str) -> None:
    """LLaVA-NeXT: methods that read the encoder or a grid, and a mix of tiles, images and rectangles."""
    small = loaded("next", torch.float32)
    stage = Schedule.parse(schedule).stages[0]
    if stage.spec.undefined_on_tiles(stage.layer, dict(stage.options)):
        pytest.skip("it is not defined for images in tiles")
    inputs = batch(small, 8)
    counted = on_pretended_gpu(small, inputs, schedule)
    assert_equal(counted, *generate(small, inputs, schedule))
    assert_waits(counted)


@pytest.mark.parametrize(
    "schedule", ["dart@2:0.44,random@6:0.07", "visionzip@0:0.3,fastv@6:0.1", "swiftvlm@3:0.5,swiftvlm@6:0.2"]
)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_layers_on_two_devices(small: Family, schedule: str, positions: str) -> None:
    """As accelerate spreads a model that is too large for one card; each layer finds its tensors on its device."""
    parts = ModelParts.of(small.model)
    if positions == "compact" and not parts.family.renumbers:
        pytest.skip("M-RoPE positions are not renumbered")
    names = {module: name for name, module in small.model.named_modules()}
    devices = {names[layer]: torch.device("cuda:1") for layer in parts.layers[4:]}

    def follow(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        device = next(module.parameters()).device
        return torch.utils._pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (args, kwargs))

    def back(module: Any, args: tuple) -> tuple:
        return (args[0].to(GPU), *args[1:])

    inputs = batch(small, 4)
    handles = [layer.register_forward_pre_hook(follow, with_kwargs=True) for layer in parts.layers]
    handles.append(parts.decoder.norm.register_forward_pre_hook(back))
    with hooked(handles):
        counted = on_pretended_gpu(small, inputs, schedule, devices=devices, positions=positions)
    with torch.no_grad(), prune(small.model, schedule, positions=positions):
        expected = small.model.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    assert torch.equal(counted.sequences, expected)
    assert_waits(counted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("schedule", [text for text in SCHEDULES if not text.startswith(("sgl", "downsample"))])
def test_a_real_gpu_hardly_waits(small: Family, schedule: str) -> None:
    """Under torch's own watch, in the stages; what runs the library's own model inside a stage is left out."""
    model = copy.deepcopy(small.model).cuda()
    parts = ModelParts.of(model)
    layers = [parts.layers[stage.layer] for stage in Schedule.parse(schedule).stages]
    inputs = {name: x.cuda() for name, x in batch(small, 8).items()}

    def begin(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("warn")

    def end(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        with (
            hooked([layer.register_forward_pre_hook(begin) for layer in layers]),
            prune(model, schedule, questions=[QUESTIONS[i % 4] for i in range(8)]),
            hooked([layer.register_forward_pre_hook(end) for layer in layers]),
        ):
            model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    waits = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
    assert len(waits) <= STAGE * len(layers), waits


class TestPretendedGpu:
    """The pretended GPU itself: it notices what a real one would wait for, and refuses what a real one refuses."""

    @staticmethod
    @contextmanager
    def gpu() -> Iterator[tuple[PretendedGpu, PretendedTensor]]:
        gpu = PretendedGpu()
        with gpu.running():
            yield gpu, PretendedTensor(torch.arange(6.0).reshape(2, 3))

    @pytest.mark.parametrize(
        ("act", "waits"),
        [
            (lambda x: x.sum().item(), 1),
            (lambda x: bool(x.sum() > 0), 1),
            (lambda x: x.tolist(), 1),
            (lambda x: x.cpu(), 1),
            (lambda x: f"{x.sum()}", 1),
            (lambda x: x[x > 2], 1),
            (lambda x: x.nonzero(), 1),
            (lambda x: x.unique(), 1),
            (lambda x: x.masked_select(x > 2), 1),
            (lambda x: x.repeat_interleave(torch.tensor([1, 2], device=x.device), dim=0), 2),
            (lambda x: x[[0, 1]], 1),
            (
                lambda x: x.__setitem__(
                    (torch.zeros_like(x[0]).long(), torch.zeros_like(x[0]).long()), torch.tensor(1.0)
                ),
                1,
            ),
            (lambda x: torch.tensor([1, 2], device=x.device), 1),
            (lambda x: torch.tensor([1, 2]).to(x.device), 1),
            (lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True), 1),
            (lambda x: torch.equal(x, x), 1),
            (lambda x: torch.tensor([1, 2]).pin_memory().to(x.device, non_blocking=True), 0),
            (lambda x: torch.where(x > 2, x, 0), 0),
            (lambda x: x.__setitem__(x > 2, 0.0), 0),
            (lambda x: x.sort().indices.gather(1, x.long() % 3), 0),
            (lambda x: x.to("cuda:1"), 0),
            (lambda x: (x @ x.T).softmax(-1) + 1, 0),
        ],
    )
    def test_waits(self, act: Callable[[Tensor], Any], waits: int) -> None:
        with self.gpu() as (gpu, x):
            act(x)
        assert sum(gpu.waits[""].values()) == waits, gpu.waits[""]

    @pytest.mark.parametrize(
        "act",
        [
            lambda x: x + torch.ones(3),
            lambda x: torch.cat([x, torch.ones(1, 3)]),
            lambda x: x @ torch.ones(3, 2),
            lambda x: x + x.to("cuda:1"),
            lambda x: torch.where(x > 2, x.to("cuda:1"), x),
        ],
    )
    def test_tensors_of_two_devices_do_not_meet(self, act: Callable[[Tensor], Any]) -> None:
        with self.gpu() as (_, x), pytest.raises(WrongDeviceError, match="tensors on"):
            act(x)

    def test_a_number_on_the_host_meets_any_device(self) -> None:
        with self.gpu() as (gpu, x):
            assert (x + torch.tensor(1.0)).device == x.device
            assert not gpu.waits[""]

    def test_values_are_those_of_the_cpu_and_views_share_memory(self) -> None:
        values = torch.randn(4, 5)
        with self.gpu():
            x = PretendedTensor(values.clone())
            x[1].zero_()
            y = x.softmax(-1).transpose(0, 1).contiguous()
        values[1] = 0
        assert torch.equal(on_cpu(y), values.softmax(-1).T)

    def test_the_model_is_on_the_cpu_again(self, small: Family) -> None:
        before = {name: x.data_ptr() for name, x in small.model.named_parameters()}
        gpu = PretendedGpu()
        with pytest.raises(ZeroDivisionError), gpu.placed(small.model):
            assert {x.device for x in small.model.parameters()} == {GPU}
            raise ZeroDivisionError
        assert {name: x.data_ptr() for name, x in small.model.named_parameters()} == before

    def test_launches_are_counted_by_phase_and_line(self) -> None:
        with self.gpu() as (gpu, x):
            gpu.phase = "one"
            x.T.reshape(2, 3)  # views, and one copy
            gpu.phase = "two"
            x.exp().sort()
        assert gpu.launches == {"one": 1, "two": 3}
        assert gpu.largest["two"] == 48
        [line] = gpu.lines["one"]
        assert "/tests/" in line
