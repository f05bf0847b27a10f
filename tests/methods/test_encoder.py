"""Signals of the vision encoder against the library's eager attentions and hidden states, at the right raster indices."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from observed import Tiny
from torch import Tensor

from lmms_prune import prune
from lmms_prune.errors import PruningError
from lmms_prune.methods.view import TokenView
from lmms_prune.models.clip_encoder import ClipEncoder
from lmms_prune.models.encoder import resized
from lmms_prune.models.qwen_encoder import QwenEncoder

DEPTH = {"llava": 3, "qwen2_5_vl": 4}


def rows_of(tiny: Tiny) -> list:
    rng = random.Random(11)
    return [tiny.row(rng, images=n, words=w) for n, w in ((1, 3), (2, 7), (0, 2), (1, 12))]


@pytest.fixture
def view(tiny: Tiny, capture_view: Callable[..., TokenView]) -> TokenView:
    return capture_view(tiny, tiny.batch(rows_of(tiny)), 2)


def raw_tower(tiny: Tiny, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Attentions of every block and states after every block, from the library's eager encoder."""
    model = tiny.model(torch.float64, "eager").model
    seen: list[Tensor] = []
    if tiny.family == "llava":
        encoder, arguments = model.vision_tower, {"pixel_values": inputs["pixel_values"]}
        blocks = encoder.encoder.layers if hasattr(encoder, "encoder") else encoder.vision_model.encoder.layers
    else:
        encoder, arguments = (
            model.visual,
            {"hidden_states": inputs["pixel_values"], "grid_thw": inputs["image_grid_thw"]},
        )
        blocks = encoder.blocks
    handles = [
        b.register_forward_hook(lambda m, a, out: seen.append(out if isinstance(out, Tensor) else out[0]))
        for b in blocks
    ]
    try:
        with torch.no_grad():
            output = encoder(**arguments, output_attentions=tiny.family == "llava")
    finally:
        for handle in handles:
            handle.remove()
    return list(output.attentions or []) if tiny.family == "llava" else [], seen


def test_clip_signals_equal_the_library(all_tiny: dict[str, Tiny], capture_view: Callable[..., TokenView]) -> None:
    tiny = all_tiny["llava"]
    inputs = tiny.batch(rows_of(tiny))
    encoder = capture_view(tiny, inputs, 2).encoder
    attentions, states = raw_tower(tiny, inputs)
    blocks = encoder.parts.encoder_blocks
    assert encoder.shape == encoder.parts.encoder_shape
    assert (encoder.shape.depth, encoder.shape.selected) == (3, 1)
    for block in range(3):
        # The library's softmax is float32 whatever the model's type is.
        torch.testing.assert_close(encoder.class_attention(block), attentions[block][:, :, 0, 1:], atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.received(block), attentions[block].mean((1, 2))[:, 1:], atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.output(block), states[block][:, 1:], atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.class_output(block), states[block][:, 0], atol=1e-5, rtol=0)
        with torch.no_grad():
            keys = blocks[block].self_attn.k_proj(blocks[block].layer_norm1(encoder.run.inputs[block][0]))
        by_head = keys[:, 1:].unflatten(-1, (attentions[block].shape[1], -1))
        torch.testing.assert_close(encoder.keys(block), sum(by_head.unbind(2)) / by_head.shape[2])
    torch.testing.assert_close(encoder.saliency(), attentions[1][:, :, 0, 1:].mean(1), atol=1e-5, rtol=0)


def test_four_patches_per_token_after_a_class_token(
    all_tiny: dict[str, Tiny], capture_view: Callable[..., TokenView], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where features are shuffled into fewer tokens: attention of a token's patches adds up, all else is their mean."""
    tiny = all_tiny["llava"]
    encoder = capture_view(tiny, tiny.batch(rows_of(tiny)), 2).encoder
    names = ("keys", "output", "received")
    one = {name: getattr(encoder, name)(1) for name in names} | {"class": encoder.class_attention(1).mean(1)}
    # Another reader of the same run: a reader keeps what it has computed.
    encoder = capture_view(tiny, tiny.batch(rows_of(tiny)), 2).encoder
    monkeypatch.setattr(encoder, "shape", replace(encoder.shape, patches_per_token=4))
    monkeypatch.setattr(encoder, "grids", [(rows // 2, columns // 2) for rows, columns in encoder.grids])
    four = {name: getattr(encoder, name)(1) for name in names} | {"class": encoder.class_attention(1).mean(1)}
    side = math.isqrt(one["keys"].shape[1])
    for name, signal in four.items():
        assert signal.shape[1] == (side // 2) ** 2
        for token in range(signal.shape[1]):
            row, column = divmod(token, side // 2)
            corner = 2 * row * side + 2 * column
            patches = one[name][:, [corner, corner + 1, corner + side, corner + side + 1]]
            expected = patches.sum(1) if name == "class" else patches.mean(1)
            torch.testing.assert_close(signal[:, token], expected)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_qwen_signals_in_plain_loops(
    family: str, all_tiny: dict[str, Tiny], capture_view: Callable[..., TokenView]
) -> None:
    """Attention rebuilt image by image in raster order of patches, with windows found by their coordinates."""
    tiny = all_tiny[family]
    inputs = tiny.batch(rows_of(tiny))
    encoder = capture_view(tiny, inputs, 2).encoder
    assert encoder.shape.selected == 3
    vision = tiny.model().config.vision_config
    full = set(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    assert (len(full) < vision.depth) == (family == "qwen2_5_vl"), "some blocks attend in windows, or none"
    _, states = raw_tower(tiny, inputs)
    window_index = library_window_index(tiny, inputs)
    start = 0
    for image, (rows, columns) in enumerate(encoder.grids):
        count = rows * columns
        members = [i for i, token in enumerate(window_index) if start <= token < start + count]
        raster = sorted(members, key=lambda i: window_index[i])
        for block in range(vision.depth):
            x = states[block].unflatten(0, (-1, 4))[raster].mean(1)
            torch.testing.assert_close(encoder.output(block)[image, :count], x, atol=1e-5, rtol=0)
            received, keys = window_received(tiny, states, inputs, block, raster, (rows, columns), block in full)
            torch.testing.assert_close(encoder.keys(block)[image, :count], keys, atol=1e-5, rtol=0)
            torch.testing.assert_close(encoder.received(block)[image, :count], received, atol=1e-5, rtol=0)
            assert (encoder.received(block)[image, count:] == 0).all()
        start += count


def library_window_index(tiny: Tiny, inputs: dict[str, Tensor]) -> list[int]:
    from transformers import vision_utils

    vision = tiny.model().config.vision_config
    if tiny.family in ("qwen2_vl", "qwen3_vl"):
        return list(range(int(inputs["image_grid_thw"].prod(1).sum()) // 4))
    index, _ = vision_utils.get_vision_window_index(
        inputs["image_grid_thw"],
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )
    return index.tolist()


def window_received(
    tiny: Tiny,
    states: list[Tensor],
    inputs: dict[str, Tensor],
    block: int,
    raster: list[int],
    grid: tuple[int, int],
    is_full: bool,
) -> tuple[Tensor, Tensor]:
    """Mean attention that each token receives, and its mean key, recomputed from the block's input."""
    encoder = tiny.model().model.visual
    if block:
        x = states[block - 1].unflatten(0, (-1, 4))[raster].flatten(0, 1)
    else:
        x = first_input(tiny, inputs).unflatten(0, (-1, 4))[raster].flatten(0, 1)
    module = encoder.blocks[block]
    with torch.no_grad():
        q, k, _ = module.attn.qkv(module.norm1(x)).reshape(len(x), 3, 4, -1).unbind(1)
    size = q.shape[-1]
    coordinates = [
        (2 * (t // grid[1]) + p // 2, 2 * (t % grid[1]) + p % 2) for t in range(len(raster)) for p in range(4)
    ]
    frequency = 1.0 / (10000.0 ** (torch.arange(0, size // 2, 2, dtype=torch.float32) / (size // 2)))
    angle = torch.stack([torch.cat([row * frequency, column * frequency]) for row, column in coordinates]).repeat(1, 2)
    cos, sin = angle.cos()[:, None].double(), angle.sin()[:, None].double()

    def turn(y: Tensor) -> Tensor:
        half = y.shape[-1] // 2
        return y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin

    scores = torch.einsum("qhd,khd->hqk", turn(q), turn(k)) / size**0.5
    if not is_full:
        window = torch.tensor([(row // 8) * 1000 + column // 8 for row, column in coordinates])
        scores = scores.masked_fill(window[:, None] != window, -torch.inf)
    keys = sum(turn(k).unbind(1)) / k.shape[1]
    return scores.softmax(-1).mean((0, 1)).reshape(-1, 4).mean(1), sum(keys[i::4] for i in range(4)) / 4


def first_input(tiny: Tiny, inputs: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    encoder = tiny.model().model.visual
    handle = encoder.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            encoder(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    finally:
        handle.remove()
    return seen[0]


def test_an_impulse_lands_at_its_raster_index(
    all_tiny: dict[str, Tiny], capture_view: Callable[..., TokenView]
) -> None:
    """One merged unit of a wide image is marked in the window order that the encoder really uses, found by its pixels."""
    tiny, rng = all_tiny["qwen2_5_vl"], random.Random(1)
    image = tiny.image(rng, (6, 5))
    inputs = tiny.batch([([image], "what")])
    plain = first_input(tiny, inputs)
    for token in (0, 4, 5, 13, 23, 29):
        changed = inputs["pixel_values"].clone()
        # The processor lays the four patches of a visual token side by side, tokens in raster order.
        changed[4 * token : 4 * token + 4] += 1.0
        moved = first_input(tiny, {**inputs, "pixel_values": changed})
        impulse = (moved != plain).any(-1).double()[:, None].expand(-1, 3)
        view = capture_view(tiny, inputs, 2)
        encoder = view.encoder
        encoder.run.outputs[1] = impulse
        assert encoder.output(1)[0, :, 0].nonzero().flatten().tolist() == [token]
        # And through the view, for tokens that are no longer all there.
        marked = view.of_image(encoder.output(1))[0, :, 0]
        assert view.index[0, marked.bool()].tolist() == ([token] if token in view.index[0].tolist() else [])


def test_features_are_what_the_decoder_is_given(view: TokenView) -> None:
    projected = view.encoder.project(view.encoder.features())
    for image, size in enumerate(view.sizes):
        torch.testing.assert_close(projected[image, :size], view.visual_embeddings[image, :size])


def test_images_encode_to_the_same_tokens(view: TokenView) -> None:
    encoded = view.encoder.encode(view.encoder.images())
    for image, tokens in enumerate(encoded):
        assert len(tokens) == view.sizes[image]
        torch.testing.assert_close(tokens, view.visual_embeddings[image, : len(tokens)])


def test_a_smaller_image_gives_fewer_tokens(view: TokenView) -> None:
    side = 28 if isinstance(view.encoder, QwenEncoder) else 14
    images = [resized(image, 2, 2, side) for image in view.encoder.images()]
    assert [len(tokens) for tokens in view.encoder.encode(images)] == [4] * len(images)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flash_attention_2"])
def test_a_block_in_halves_equals_the_library_s_to_the_last_bit(
    all_tiny: dict[str, Tiny],
    capture_view: Callable[..., TokenView],
    kernel: str,
    biased: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the kernel that the model runs with; FlashAttention takes no bias, so torch's own kernel replaces it."""
    tiny = all_tiny["llava"]
    encoder = capture_view(tiny, tiny.batch(rows_of(tiny)), 2).encoder
    assert isinstance(encoder, ClipEncoder)
    block = encoder.parts.encoder_blocks[1]
    generator, weight = torch.Generator().manual_seed(0), block.layer_norm1.weight
    x = torch.randn(2, 17, weight.shape[0], generator=generator).to(weight)
    bias = torch.rand(2, 17, generator=generator).log().to(weight) if biased else None
    config = block.self_attn.config
    if kernel == "flash_attention_2" and not biased:
        pytest.skip("needs FlashAttention itself")
    monkeypatch.setattr(config, "_attn_implementation", "sdpa" if kernel == "flash_attention_2" else kernel)
    with torch.no_grad():
        expected = block(x, None if bias is None else bias[:, None, None])
        monkeypatch.setattr(config, "_attn_implementation", kernel)
        attended, keys = encoder.attend(1, x, bias)
        torch.testing.assert_close(encoder.feed(1, attended), expected, rtol=0, atol=0)
        projected = block.self_attn.k_proj(block.layer_norm1(x))
    assert torch.equal(keys.transpose(1, 2).flatten(2), projected)


@pytest.mark.parametrize("answers", [2, 3])
def test_several_answers_share_an_image(tiny: Tiny, answers: int) -> None:
    """`generate` encodes an image once and repeats it; every row must still see its own."""
    inputs = tiny.batch(rows_of(tiny))
    model = tiny.model()
    with torch.no_grad(), prune(model, "fastervlm@1:0.3") as once:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    with torch.no_grad(), prune(model, "fastervlm@1:0.3") as often:
        model.generate(**inputs, max_new_tokens=1, do_sample=True, num_return_sequences=answers)
    expected = [row.indices(0) for row in once.rows for _ in range(answers)]
    assert [row.indices(0) for row in often.rows] == expected


def test_images_encoded_outside_are_an_error(all_tiny: dict[str, Tiny]) -> None:
    tiny = all_tiny["llava"]
    inputs = tiny.batch(rows_of(tiny))
    model = tiny.model()
    with torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        with pytest.raises(PruningError, match="encoded outside"), prune(model, "fastervlm@1:0.3"):
            model(**inputs, mm_encoder_outputs={"image": features})


def test_nothing_is_recorded_unless_needed(tiny: Tiny) -> None:
    encoder = tiny.model().model.vision_tower if tiny.family == "llava" else tiny.model().model.visual
    inputs = tiny.batch([tiny.row(random.Random(0))])

    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in encoder.modules())

    with torch.no_grad():
        # The library puts on some of its own at the first call.
        tiny.model()(**inputs)
        before = hooks()
        with prune(tiny.model(), "fastv@1:0.5"):
            assert hooks() == before
            tiny.model()(**inputs)
        with prune(tiny.model(), "fastervlm@1:0.5"):
            assert hooks() == before + 3, "before and after the encoder, and before one block"
            tiny.model()(**inputs)
        assert hooks() == before
