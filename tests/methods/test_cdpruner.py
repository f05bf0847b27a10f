"""CDPruner against brute force, a slow reference of its kernel and greedy search, and CLIP as the library runs it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from observed import HandView, Observed, Tiny, angles, assert_agree, chosen, image_count, kept, observe
from slow import cosine, dot, unit
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from lmms_prune import prune
from lmms_prune.demo.language import LLAVA_SPECIALS, train_tokenizer
from lmms_prune.errors import PruningError, UnsupportedModelError
from lmms_prune.methods.cdpruner import CDPruner, _greedy, _scaled
from lmms_prune.methods.shared.auxiliary import load_clip
from lmms_prune.methods.view import TokenView

LONG = " ".join(["how many red people in this image", "what colour is the blue square left of the circle"] * 6)


def scaled(relevance: Sequence[float]) -> list[float]:
    low, span = min(relevance), max(relevance) - min(relevance)
    return [1.0 if span < 1e-6 else (x - low + 1e-6) / span for x in relevance]


def greedy(kernel: list[list[float]], count: int) -> tuple[set[int], float]:
    """Fast greedy MAP inference, as published: one row of an incremental Cholesky factor a pick."""
    n, picked, margin = len(kernel), [], math.inf
    gain, factors = [kernel[i][i] for i in range(n)], [[] for _ in range(n)]
    for _ in range(count):
        ranked = sorted((i for i in range(n) if i not in picked), key=lambda i: (-gain[i], i))
        j = ranked[0]
        if len(ranked) > 1:
            margin = min(margin, (gain[j] - gain[ranked[1]]) / gain[j])
        picked.append(j)
        # The reference goes on with the picked ones, too; they are masked.
        e = [(kernel[j][i] - dot(factors[j], factors[i])) / math.sqrt(gain[j]) for i in range(n)]
        for i in range(n):
            factors[i].append(e[i])
            gain[i] = max(gain[i] - e[i] ** 2, 1e-6 * kernel[i][i])
    return set(picked), margin


def kernel_of(vectors: Sequence[Sequence[float]], relevance: Sequence[float]) -> list[list[float]]:
    units = [unit(x) for x in vectors]
    return [
        [a * dot(x, y) * b for b, y in zip(relevance, units, strict=True)]
        for a, x in zip(relevance, units, strict=True)
    ]


def reference(
    vectors: Sequence[Sequence[float]], relevance: Sequence[float], count: int, sign: str = "negative"
) -> tuple[set[int], float]:
    side = -1 if sign == "negative" else 1
    return greedy(kernel_of(vectors, scaled([side * x for x in relevance])), count)


# -- the greedy search -------------------------------------------------------------------------------------------------


def run_greedy(vectors: Tensor, count: int) -> set[int]:
    return chosen(_greedy(vectors[None], torch.ones(1, len(vectors), dtype=torch.bool), torch.tensor([count])))[0]


def test_by_hand() -> None:
    # Three tokens in the plane at 0°, 30°, 90° with relevances 1, 0.9, 0.5. Diagonal of the kernel: 1, 0.81, 0.25.
    # Token 0 is picked. What is left of the others after its direction is taken off: 0.81·sin²30° = 0.2025 and
    # 0.25·sin²90° = 0.25: token 2, though it is less relevant.
    vectors = angles(0, 30, 90, length=[1.0, 0.9, 0.5])[0]
    assert run_greedy(vectors, 1) == {0}
    assert run_greedy(vectors, 2) == {0, 2}
    # At relevance 0.4: 0.16, and token 1 comes first.
    assert run_greedy(angles(0, 30, 90, length=[1.0, 0.9, 0.4])[0], 2) == {0, 1}


def test_scaling_by_hand() -> None:
    valid = torch.tensor([[True, True, True, False], [True, True, True, True], [True, False, False, False]])
    relevance = torch.tensor([[0.2, 0.6, 0.4, 9.0], [0.3, 0.3, 0.3, 0.3], [0.7, 0, 0, 0]], dtype=torch.float64)
    found = _scaled(relevance, valid)
    expected = torch.tensor([(0 + 1e-6) / 0.4, (0.4 + 1e-6) / 0.4, (0.2 + 1e-6) / 0.4], dtype=torch.float64)
    torch.testing.assert_close(found[0, :3], expected)
    assert found[1].tolist() == [1, 1, 1, 1]
    assert found[2, 0] == 1


def test_greedy_is_the_best_next_determinant() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        vectors = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        gram, picked = vectors @ vectors.T, []
        for count in range(1, 6):
            rest = [i for i in range(8) if i not in picked]
            picked.append(max(rest, key=lambda i: float(gram[[*picked, i]][:, [*picked, i]].det())))
            assert run_greedy(vectors, count) == set(picked)


def test_greedy_is_near_the_best_set() -> None:
    """Not a proof of anything but of the right object: of all pairs, greedy finds one of nearly the largest determinant."""
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gram = vectors @ vectors.T
    values = {pair: float(gram[list(pair)][:, list(pair)].det()) for pair in combinations(range(7), 2)}
    assert values[tuple(sorted(run_greedy(vectors, 2)))] >= max(values.values()) / 4


def test_equal_tokens() -> None:
    """Nothing is picked twice, a copy only when all directions are taken, and ties go to the lower index."""
    assert run_greedy(torch.ones(6, 3, dtype=torch.float64), 4) == {0, 1, 2, 3}
    vectors = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1, 2]]
    assert run_greedy(vectors, 3) == {0, 2, 4}
    assert run_greedy(vectors, 5) == {0, 1, 2, 3, 4}
    assert run_greedy(vectors.float(), 4) == {0, 1, 2, 4}


def test_zero_vectors_come_last() -> None:
    vectors = torch.eye(4, dtype=torch.float64)
    vectors[:2] = 0
    assert [run_greedy(vectors, count) for count in (1, 2, 3, 4)] == [{2}, {2, 3}, {0, 2, 3}, {0, 1, 2, 3}]


def test_more_picks_than_dimensions() -> None:
    vectors = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for count in (4, 5, 17, 40):
        assert len(run_greedy(vectors, count)) == count
        assert run_greedy(vectors, count) >= run_greedy(vectors, 4)


@pytest.mark.parametrize(("visual", "budget"), [(1, 1), (1, 0), (3, 2), (5, 5)])
def test_few_tokens(visual: int, budget: int) -> None:
    view = HandView(torch.randn(1, visual + 2, 4, dtype=torch.float64), visual)
    assert len(chosen(CDPruner(clip="embeddings").select(view, torch.tensor([budget])))[0]) == budget


def test_no_text_makes_all_equally_relevant() -> None:
    """All gains are equal at first, so a slow reference would differ by its rounding: the same vectors are searched."""
    hidden = torch.randn(1, 9, 4, dtype=torch.float64)
    view = HandView(hidden, 8)
    assert view.text.slots.shape[1] == 0
    found = CDPruner(clip="embeddings").select(view, torch.tensor([3]))
    alike = _greedy(normalize(hidden[:, 1:], dim=-1), view.valid, torch.tensor([3]))
    assert torch.equal(found, alike)


# -- relevance by embeddings -------------------------------------------------------------------------------------------


def by_embeddings(seen: Observed, number: int) -> tuple[list[list[float]], list[float]]:
    """The visual embeddings of an image, and the mean cosine of each to the text after it."""
    span = seen.spans[number]
    states = seen.states(span, 0)
    vectors, words = [states[c] for c in span.visual], [states[c] for c in span.text]
    units = [unit(word) for word in words]
    return vectors, [sum(dot(x, word) for word in units) / len(units) for x in map(unit, vectors)]


@pytest.mark.parametrize("sign", ["negative", "positive"])
def test_embeddings_equal_slow_reference(tiny: Tiny, batches: list[Observed], sign: str) -> None:
    ratios = (0.33, 0.5, 0.1, 0.2, 0.4, 0.6, 0.05, 0.25)
    batches = batches if sign == "negative" else batches[::3]
    got, want = [], []
    for layer, (seen, ratio) in enumerate(zip(batches, ratios, strict=False)):
        got += kept(tiny.run(seen.inputs, f"cdpruner@{layer}:{ratio};clip=embeddings;sign={sign}")[0])
        for number, span in enumerate(seen.spans):
            want.append(reference(*by_embeddings(seen, number), round(ratio * len(span.visual)), sign))
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def test_signs_differ(tiny: Tiny, batches: list[Observed]) -> None:
    texts = [f"cdpruner@0:0.2;clip=embeddings;sign={sign}" for sign in ("negative", "positive")]
    first, second = (kept(tiny.run(batches[0].inputs, text)[0]) for text in texts)
    assert first != second


def test_after_an_earlier_stage(tiny: Tiny) -> None:
    """Relevance is scaled over what is still there, and the embeddings are still those of layer 0."""
    seen = observe(tiny, tiny.batch([tiny.row(random.Random(i)) for i in range(5)]))
    trace, _ = tiny.run(seen.inputs, "random@1:0.6,cdpruner@3:0.25;clip=embeddings")
    want = []
    for number, (span, row) in enumerate(zip(seen.spans, trace.rows, strict=True)):
        [present] = row.indices(0)
        vectors, relevance = by_embeddings(seen, number)
        count = round(0.25 * len(span.visual))
        found, margin = reference([vectors[i] for i in present], [relevance[i] for i in present], count)
        want.append(({present[i] for i in found}, margin))
    assert_agree(kept(trace, 1), want)


# -- relevance by CLIP -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP whose vision encoder is as wide as the tiny LLaVA's."""
    return make_clip(tmp_path_factory.mktemp("clip") / "clip", 64)


def make_clip(folder: Path, width: int) -> Path:
    tokenizer = train_tokenizer(LLAVA_SPECIALS, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        for parameter in model.parameters():
            # Larger than the library's start, so that texts differ.
            parameter.data.normal_(std=0.4 / math.sqrt(parameter.shape[-1] / 16) if parameter.dim() > 1 else 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def library_clip(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()


@cache
def library_texts(folder: Path, text: str) -> list[list[float]]:
    """Each segment by itself through the library's own model."""
    model = library_clip(folder)
    tokenizer = train_tokenizer(LLAVA_SPECIALS, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = []
    for start in range(0, max(1, len(ids)), 75):
        segment = [tokenizer.bos_token_id, *ids[start : start + 75], tokenizer.eos_token_id]
        assert len(segment) <= 77
        with torch.no_grad():
            output = model.get_text_features(torch.tensor([segment]))
        found.append((output if isinstance(output, Tensor) else output.pooler_output)[0].tolist())
    return found


def by_clip(folder: Path, features: Tensor, text: str) -> list[float]:
    model = library_clip(folder)
    with torch.no_grad():
        images = model.visual_projection(model.vision_model.post_layernorm(features)).tolist()
    texts = library_texts(folder, text)
    return [sum(cosine(x, segment) for segment in texts) / len(texts) for x in images]


@pytest.mark.parametrize("text", ["", "what colour is the circle", LONG])
def test_texts_equal_the_library(clip_folder: Path, text: str) -> None:
    clip = load_clip(str(clip_folder), torch.device("cpu"), torch.float64)
    [alone] = clip.texts([text])
    expected = torch.tensor(library_texts(clip_folder, text), dtype=torch.float64)
    assert len(expected) == (1 if text != LONG else 2)
    torch.testing.assert_close(alone, expected)
    # Beside longer ones it is padded.
    several = clip.texts(["how many", text, LONG])
    torch.testing.assert_close(several[1], expected)


def test_clip_equals_slow_reference(
    all_tiny: dict[str, Tiny],
    observed_batches: Callable[[str], list[Observed]],
    encoder_view: Callable[..., TokenView],
    clip_folder: Path,
) -> None:
    tiny, got, want = all_tiny["llava"], [], []
    ratios, rng = (0.33, 0.1, 0.2), random.Random(0)
    batches = observed_batches("llava")[: len(ratios)]
    for layer, (seen, ratio) in enumerate(zip(batches, ratios, strict=True)):
        questions = [rng.choice(["is it red", "how many people", LONG, "left or right", ""]) for _ in seen.spans]
        got += kept(tiny.run(seen.inputs, f"cdpruner@{layer}:{ratio};clip={clip_folder}", questions=questions)[0])
        features = encoder_view(tiny, seen).encoder.features()
        for number, (span, text) in enumerate(zip(seen.spans, questions, strict=True)):
            states, relevance = seen.states(span, 0), by_clip(clip_folder, features[number], text)
            want.append(reference([states[c] for c in span.visual], relevance, round(ratio * 64)))
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def test_the_question_matters(all_tiny: dict[str, Tiny], clip_folder: Path) -> None:
    tiny = all_tiny["llava"]
    inputs = tiny.batch([tiny.row(random.Random(0), images=2), tiny.row(random.Random(1))])
    text = f"cdpruner@0:0.2;clip={clip_folder}"
    first, again, other = (
        kept(tiny.run(inputs, text, questions=[question, "is it red"])[0])
        for question in ("is it red", "is it red", "how many people left of the blue square")
    )
    assert first == again
    assert first[:2] != other[:2]
    assert first[2] == other[2]
    with pytest.raises(PruningError, match="questions="):
        tiny.run(inputs, text)


def test_a_second_model_is_loaded_once(all_tiny: dict[str, Tiny], clip_folder: Path) -> None:
    tiny = all_tiny["llava"]
    inputs = tiny.batch([tiny.row(random.Random(0))])
    load_clip.cache_clear()
    for _ in range(3):
        tiny.run(inputs, f"cdpruner@0:0.2;clip={clip_folder},cdpruner@4:0.1;clip={clip_folder}", questions=["is it"])
    assert load_clip.cache_info().misses == 1


def test_unusable_clips_are_refused(all_tiny: dict[str, Tiny], tmp_path: Path, clip_folder: Path) -> None:
    llava, qwen = all_tiny["llava"].model(), all_tiny["qwen2_5_vl"].model()

    def refused(model: torch.nn.Module, clip: str, message: str) -> None:
        text = "cdpruner@0:0.5" + (f";clip={clip}" if clip else "")
        with pytest.raises(UnsupportedModelError, match=message), prune(model, text):
            pass

    refused(qwen, "", r"clip=openai/clip-vit-large-patch14-336 .* use clip=embeddings")
    refused(qwen, str(clip_folder), r"clip=.* does not have; use clip=embeddings")
    nowhere = str(tmp_path / "nowhere")
    refused(llava, nowhere, rf"clip={nowhere} cannot be loaded: give .* or clip=embeddings")
    refused(llava, str(all_tiny["llava"].folder), r"clip=.* (cannot be loaded|has no weights for .*): give .*CLIP")
    wide = str(make_clip(tmp_path / "wide", 48))
    refused(llava, wide, r"clip=.* width 48, but the model's has 64")
