"""TokenView: everything that a pruning method may read at one stage.

A view's rows are *images*: a sample with two images gives two rows, so that every method treats every image
independently of the rest of the batch. Dimension letters: B images, V visual tokens (padded to the batch's longest), T text tokens,
L sequence, H attention heads, D hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NoReturn

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from lmms_prune.errors import PruningError
from lmms_prune.methods.shared.memory import Memory, State
from lmms_prune.methods.shared.tensors import owners, settled
from lmms_prune.methods.spec import READS
from lmms_prune.models.encoder import MOST, Encoder, EncoderRun
from lmms_prune.models.family import Grid
from lmms_prune.models.mosaic import Tiles
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.tensors import finest, is_finite, to_device

# What a signal reads by itself.
_IMPLIED = {"encoder": ("grid", "pixels"), "guide": ("encoder", "grid", "pixels", "attention ahead")}
_OUTSIDE = "the method reads {}, but the images were encoded outside the prune block; give pixel_values inside it."


@dataclass(frozen=True)
class Tokens:
    """A set of tokens of each image: `slots` are their columns in the sequence, padded on the right."""

    slots: Int[Tensor, "B N"]
    valid: Bool[Tensor, "B N"]


@dataclass(frozen=True)
class LayerInput:
    """The input of one decoder layer: hidden states and rotary tables of the whole batch, and its keys once it ran."""

    layer: int
    hidden: Float[Tensor, "R L D"]
    rotary: tuple[Tensor, Tensor]
    keys: Float[Tensor, "R H L d"] | None = None


@dataclass
class TokenView:
    """The signals that a method may read when it acts at the input of decoder layer `layer`.

    Args:
        layer: 0-based decoder layer.
        rows: the batch row of each image.
        visual: the visual tokens still present, in sequence order (raster order unless a method reordered them).
        text: all text tokens after the image: the question and the assistant's header.
        index: raster index of each visual token in its image; arbitrary where padding.
        counts: visual tokens present in each image, known on the host.
        sizes: original visual tokens of each image, known on the host.
        _owning_rows: `rows` on the host.
        seeds: one text per image, from which alone its random draws follow.
        images: the sample of each image, and its number within the sample.
        requested: tokens that the stage requests in each image, before the method's count rule, where known on the host.
        carry: what `select` hands to `rewrite` of the same stage: one object of a class of the method's own.
        memory: state that methods pass from stage to stage; lives for one prefill.
        _questions: the question of each image's row as text, if `prune` was called with questions.
        _grid_list: rows and columns of each image's original tokens, where known.
        _tiles: the tiles of the batch's images, where images are encoded in tiles.
        _encoder_run: the recorded signals of the vision encoder.
        _guide: runs an auxiliary model on the batch and returns its attention.
        _parts: the model.
        _state: the input of this layer.
        _before: the input of the layer before, if a method reads attention or keys.
        _embedded: the input of layer 0, if a method reads embeddings.
        _unpruned_rotary: rotary tables of the unpruned sequence.
        _position_ids: positions of the unpruned sequence, as the decoder was called with; None if they are its columns.
        _additions: the tensors that the decoder will still add to the tokens present between its layers, layer by layer.
        _present: whether each column of the sequence holds a token.
        _origin: the original column of each column of the sequence.
        _columns: the original column of each of an image's original visual tokens, by raster index.
        _declared: the signals that may be read now; None is all that there are.
    """

    layer: int
    rows: Int[Tensor, " B"]
    visual: Tokens
    text: Tokens
    index: Int[Tensor, "B V"]
    counts: Sequence[int]
    sizes: Sequence[int]
    _owning_rows: Sequence[int]
    seeds: Sequence[str]
    _parts: ModelParts
    _state: LayerInput
    _before: LayerInput | None
    _present: Bool[Tensor, "R L"]
    _origin: Int[Tensor, "R L"]
    _columns: Int[Tensor, "B N"]
    images: Sequence[tuple[str, int]] = ()
    _additions: Sequence[Float[Tensor, "B V D"]] = ()
    _embedded: Float[Tensor, "R L0 D"] | None = None
    _unpruned_rotary: tuple[Tensor, Tensor] | None = None
    _position_ids: Tensor | None = None
    _grid_list: Sequence[Grid] = ()
    _tiles: Tiles | None = None
    _encoder_run: EncoderRun | None = None
    _questions: Sequence[str] | None = None
    requested: Sequence[int] | None = None
    _guide: Callable[[Encoder, str, int, bool], Tensor] | None = None
    carry: object = None
    memory: Memory = field(default_factory=Memory)
    _declared: frozenset[str] | None = None

    @cached_property
    def read_words(self) -> set[str]:
        """The signals that were read so far, as words of `READS`."""
        return set()

    @contextmanager
    def read_by(self, reads: Sequence[str] | None) -> Iterator[None]:
        """Inside the block, only the signals in `reads` may be read; None is no restriction."""
        self._declared = None if reads is None else frozenset(reads) | {x for r in reads for x in _IMPLIED.get(r, ())}
        try:
            yield
        finally:
            self._declared = None

    def _reading(self, word: str) -> None:
        """Refuse to read a signal that the method does not declare.

        Raises:
            PruningError: names the word to write.
        """
        self.read_words.add(word)
        if self._declared is not None and word not in self._declared:
            self._undeclared(word)

    def _undeclared(self, word: str) -> NoReturn:
        declared = sorted(self._declared or ())
        raise PruningError(
            f"the method reads {READS[word]}, but declares only {', '.join(map(repr, declared)) or 'nothing'}: "
            f"add {word!r} to the class's `reads` (a built-in method: to its row in METHODS)."
        )

    def carried(self, kind: type[State]) -> State:
        """The `carry`, which must be a `kind`.

        Raises:
            PruningError: `select` has handed over nothing, or something else.
        """
        if not isinstance(self.carry, kind):
            raise PruningError(f"`rewrite` reads a {kind.__name__}, but `select` left {self.carry!r} in `view.carry`.")
        return self.carry

    def remember(self, state: object) -> None:
        """Store `state` for the later stages of this prefill."""
        self.memory.store(self.layer, state)

    def remembered(self, kind: type[State]) -> State | None:
        """The `kind` that the nearest earlier stage has stored, or None."""
        return self.memory.before(self.layer, kind)

    @property
    def valid(self) -> Bool[Tensor, "B V"]:
        """Which entries of the V dimension are tokens; the rest is padding."""
        return self.visual.valid

    @property
    def first_column(self) -> Int[Tensor, " B"]:
        """The column at which each image's row begins, after its padding."""
        return (~self._present).sum(1)[self.rows]

    @cached_property
    def hidden(self) -> Float[Tensor, "B V D"]:
        """Hidden states of the visual tokens at the input of this layer; at layer 0 the projector's output."""
        self._reading("hidden")
        return self._of(self._state.hidden, self.visual)

    @cached_property
    def additions(self) -> Float[Tensor, "B V A"]:
        """What the decoder will still add to each token present between its layers (DeepStack), side by side.

        A is 0 where it adds nothing: in most families, and after the last layer that is followed by an addition.
        """
        return (
            torch.cat([x.to(self.hidden) for x in self._additions], dim=-1) if self._additions else self.hidden[..., :0]
        )

    def with_additions(self, states: Float[Tensor, "B V C"]) -> Float[Tensor, "B V E"]:
        """`states` of the tokens present and, behind them, their `additions`: all that a token carries.

        What is merged into one token must be merged in both parts, by the same weights; `Method.rewrite` returns both.
        """
        return torch.cat([states, self.additions.to(states)], dim=-1) if self._additions else states

    def normed(self, tokens: Tokens) -> Float[Tensor, "B N D"]:
        """The decoder's final norm applied to this layer's input of `tokens`."""
        self._reading("hidden")
        return self._parts.final_norm(self._of(self._state.hidden, tokens))

    def keys(self, tokens: Tokens, *, head_mean: bool = False) -> Float[Tensor, "B N K"]:
        """Keys of `tokens` in the layer before, after rotation: its KV heads side by side, or their mean (float32)."""
        self._reading("keys")
        keys = self._keys_of(self._layer_before).transpose(1, 2)
        return self._of(keys.to(_fine(keys)).mean(2) if head_mean else keys.flatten(2), tokens)

    def values(self, tokens: Tokens) -> Float[Tensor, "B G N d"]:
        """Value vectors of `tokens` in the layer before, one for each KV head; in float32 or finer."""
        self._reading("values")
        return self._of(self._values, tokens).transpose(1, 2)

    def rotary_means(self) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B V"]]:
        """The mean over all frequencies of the cosine, and of the sine, of each visual token's original position.

        With M-RoPE the mean over its channels too, each with all frequencies. In the finest type, from float32 tables.
        """
        self._reading("positions")
        columns = torch.where(self.valid, self._column_of(self.index), 0)
        positions = columns
        if self._position_ids is not None:
            known = self._position_ids.to(columns.device)
            rows = self.rows if known.shape[-2] > 1 else torch.zeros_like(self.rows)
            # With M-RoPE the last three channels; the library puts the columns' numbers before them.
            positions = (known if known.dim() == 2 else known[-3:])[..., rows[:, None], columns]
        cos, sin = (settled(mean.to(self.valid.device)) for mean in self._parts.rotary_means(positions))
        if positions.dim() == 2:
            return cos, sin
        # Height and width first: so tokens that differ in nothing but their order tie.
        return ((cos[1] + cos[2]) + cos[0]) / 3, ((sin[1] + sin[2]) + sin[0]) / 3

    @property
    def row_tokens(self) -> Tokens:
        """All tokens that are present in the image's row: system, images and text."""
        present = self._present[self.rows]
        return Tokens(torch.arange(present.shape[1], device=present.device).expand_as(present), present)

    @property
    def last(self) -> Tokens:
        """The row's last prompt token, once for each image: the query of FastV and its kin."""
        column = torch.full_like(self.rows, self._state.hidden.shape[1] - 1)[:, None]
        return Tokens(column, torch.ones_like(column, dtype=torch.bool))

    def attention(self, queries: Tokens, *, ahead: bool = False, rotated: bool = True) -> Float[Tensor, "B H Q V"]:
        """Attention of `queries` to each visual token, normalised over all keys that a query sees.

        Recomputed for these queries alone, so that any attention kernel may run the layer itself; in float32 or finer.

        Args:
            queries: text or visual tokens of each image; padding entries get something finite.
            ahead: in this layer, on the tokens present now; otherwise in the layer before.
            rotated: whether queries and keys are rotated to their positions, as the layer does it.
        """
        self._reading("attention ahead" if ahead else "attention")
        source = self._state if ahead else self._layer_before
        if not rotated:
            cos, sin = source.rotary
            source = replace(source, rotary=(torch.ones_like(cos), torch.zeros_like(sin)), keys=None)
        key = self._keys_of(source) if rotated else self._parts.keys(source.layer, source.hidden, source.rotary)
        device = source.hidden.device
        hidden = source.hidden[self.rows.to(device)[:, None], queries.slots.to(device)]
        cos, sin = (self._at(table, queries) for table in source.rotary)
        query = self._parts.queries(source.layer, hidden, (cos, sin))
        column = torch.arange(key.shape[2], device=key.device)
        query_column = queries.slots.to(key.device)[..., None]
        seen = self._present.to(key.device)[self.rows.to(key.device)][:, None] & (column <= query_column)
        # A padding entry sees itself, so that it is finite: NaN times zero would be NaN.
        weights = self._weights(source.layer, query, key[self.rows.to(key.device)], seen | (column == query_column))
        return weights.gather(-1, self.visual.slots[:, None, None].expand(-1, *weights.shape[1:3], -1))

    def attention_to(
        self, states: Float[Tensor, "B C D"], index: Int[Tensor, "B C"] | None, exists: Bool[Tensor, "B C"]
    ) -> Float[Tensor, "B H C"]:
        """Look-ahead attention of the last prompt token to candidates that replace the visual tokens present.

        Normalised over the text, other images and the candidates, as if these were in the sequence. All have their
        original positions, also where the run renumbers: a restored token has no other position.

        Args:
            states: inputs of this layer.
            index: the raster index whose position each candidate has; None if they are all original tokens in raster order.
            exists: which candidates count; the others get 0.
        """
        self._reading("attention ahead")
        assert self._unpruned_rotary is not None
        layer, hidden = self._state.layer, self._state.hidden[self.rows]
        # The keys of the sequence and of the candidates, in one go.
        # Those that do not exist may have any column.
        columns = self._columns if index is None else self._column_of(index)
        columns = columns.clamp(0, self._unpruned_rotary[0].shape[-2] - 1)
        seen = torch.cat([self._present[self.rows], exists, exists[:, :1]], dim=1)
        tokens = Tokens(torch.cat([self._origin[self.rows], columns], dim=1), seen[:, :-1])
        cos, sin = (self._at(table, tokens) for table in self._unpruned_rotary)
        key = self._parts.keys(layer, torch.cat([hidden, states.to(hidden)], dim=1), (cos, sin))
        # The image's own visual tokens are hidden from the query; padding is written to a spare last column.
        own = self.visual.slots.masked_fill(~self.valid, seen.shape[1] - 1)
        seen = seen.scatter_(1, own, False)[:, :-1].to(key.device)[:, None]
        length = hidden.shape[1]
        last = slice(length - 1, length)
        query = self._parts.queries(layer, hidden[:, last], (cos[..., last, :], sin[..., last, :]))
        return self._weights(layer, query, key, seen)[:, :, 0, length:]

    def rotated_ones(self, tokens: Tokens) -> Float[Tensor, "B N d"]:
        """The all-ones vector of a head, rotated to each token's position (SparseVLM's positional bias)."""
        cos, sin = (self._at(table, tokens) for table in self._state.rotary)
        return self._parts.rotate(torch.ones_like(cos if cos.dim() == 3 else cos[0]), (cos, sin))

    def attention_chunks(self, queries: Tokens, *, ahead: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """`attention` of many queries in pieces that fit into memory: which queries, and their (B, H, q, V)."""
        heads = self._parts.decoder.config.num_attention_heads
        size = max(1, MOST // max(1, len(self.rows) * heads * self._state.hidden.shape[1]))
        for start in range(0, queries.slots.shape[1], size):
            piece = slice(start, min(start + size, queries.slots.shape[1]))
            yield piece, self.attention(Tokens(queries.slots[:, piece], queries.valid[:, piece]), ahead=ahead)

    @cached_property
    def original(self) -> Tokens:
        """All original visual tokens of each image in raster order; the slots are those of the unpruned sequence."""
        sizes = to_device(self.sizes, self.valid.device)
        column = torch.arange(max(self.sizes, default=0), device=self.valid.device)
        valid = column < sizes[:, None]
        return Tokens(torch.where(valid, self._columns, 0), valid)

    @cached_property
    def visual_embeddings(self) -> Float[Tensor, "B N D"]:
        """The decoder's input for all tokens of `original`: the projector's (or merger's) output."""
        self._reading("embeddings")
        return self._of(self._input_embeddings, self.original)

    @cached_property
    def text_embeddings(self) -> Float[Tensor, "B T D"]:
        """Input embeddings of `text`."""
        self._reading("embeddings")
        slots = self._origin[self.rows[:, None], self.text.slots]
        return self._of(self._input_embeddings, Tokens(slots, self.text.valid))

    def of_image(self, signal: Shaped[Tensor, "B N *D"]) -> Shaped[Tensor, "B V *D"]:
        """The values of a signal over all original visual tokens for the tokens present."""
        return signal.to(self.valid.device)[self._present_tokens]

    @cached_property
    def _present_tokens(self) -> tuple[Int[Tensor, "B 1"], Int[Tensor, "B V"]]:
        """The image and the raster index of each token present, 0 where padding."""
        index = torch.where(self.valid, self.index, 0)
        return torch.arange(len(index), device=index.device)[:, None], index

    @property
    def grids(self) -> list[Grid]:
        """Rows and columns of the original visual tokens of each image, known on the host.

        Raises:
            PruningError: the images were encoded before pruning began, or are no single rectangles.
        """
        self._reading("grid")
        if self._tiles is not None and not self._grid_list:
            raise PruningError(
                "the method reads the image's grid, but an image in tiles has several: name 'grid' in what the method "
                "reads (then it gets them one by one), or add ';per=tile' to its stage."
            )
        if len(self._grid_list) < len(self.sizes):
            raise PruningError(_OUTSIDE.format("the images' grids"))
        return list(self._grid_list)

    @property
    def rectangles(self) -> list[tuple[Sequence[Grid], list[int]]]:
        """The grids of each row's image (base and canvas, if it is in tiles), and which of that image's tokens the row has.

        Raises:
            PruningError: the images were encoded before pruning began.
        """
        self._reading("rectangles")
        if self._tiles is not None:
            mosaics = self._tiles.mosaics
            return [(mosaics[image].rectangles, list(region.raster)) for image, region in self._tiles.rows]
        if len(self._grid_list) < len(self.sizes):
            raise PruningError(_OUTSIDE.format("the images' grids"))
        return [((grid,), list(range(grid[0] * grid[1]))) for grid in self._grid_list]

    @cached_property
    def encoder(self) -> Encoder:
        """Signals of the vision encoder.

        Raises:
            PruningError: the images were encoded before pruning began.
        """
        self._reading("encoder")
        run = self._encoder_run
        if run is None:
            raise PruningError(_OUTSIDE.format("the vision encoder"))
        if self._tiles is not None:
            return self._tiled_encoder(run, self._tiles)
        grids = self.grids
        recorded = len(run.grids) if run.grids is not None else len(run.pixels) or self._recorded_images(run)
        repeats = len(grids) // recorded if recorded else 0
        if not repeats or recorded * repeats != len(grids):
            raise PruningError(f"the vision encoder saw {recorded} images, but the prompts hold {len(grids)}.")
        owner = owners(self._owning_rows, repeats)
        run_grids = [grids[owner.index(i)] for i in range(recorded)]
        return self._parts.family.signals_class()(self._parts, run, owner, run_grids)

    def _tiled_encoder(self, run: EncoderRun, tiles: Tiles) -> Encoder:
        recorded, expected = len(run.pixels) or self._recorded_images(run), sum(x.encoded for x in tiles.mosaics)
        if recorded != expected:
            raise PruningError(f"the vision encoder saw {recorded} tiles, but the prompts' images have {expected}.")
        return self._parts.family.signals_class()(self._parts, run, tiles)

    def question(self) -> list[str]:
        """The question of each image's row as text.

        Raises:
            PruningError: `prune` was not given the questions.
        """
        self._reading("question")
        if self._questions is None:
            raise PruningError("the method reads the question as text: give prune(…, questions=[…]), one per row.")
        return list(self._questions)

    def guided(self, checkpoint: str, new_tokens: int, last_visual: bool) -> Float[Tensor, "B N"]:
        """Attention that a guide model's whole answer pays to each original visual token (see `lmms_prune.pruning.guide`)."""
        self._reading("guide")
        if self._guide is None:
            self._undeclared("guide")
        return self._guide(self.encoder, checkpoint, new_tokens, last_visual).to(self.valid.device)

    def ranking(
        self, score: Float[Tensor, "B N"], candidates: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N"]:
        """`score`, registered for a check: after the prompt, samples with a score that is not finite are reported.

        Args:
            score: one per candidate; other entries may hold any value.
            candidates: by default the visual tokens that are present.
        """
        checked = self.valid if candidates is None else candidates
        # Of booleans: finite, or not checked.
        self.finite_scores.append((is_finite(score) >= checked.to(score.device)).all(1))
        return score

    @cached_property
    def finite_scores(self) -> list[Bool[Tensor, " B"]]:
        """For each `ranking`, whether all scores of each image were finite; stays on the device."""
        return []

    def uniform(self) -> Float[Tensor, "B V"]:
        """Independent uniform draws, one per token, from each image's own seed.

        Drawn on the CPU with one generator per image, so that neither the batch, the order nor the device matters.
        """
        draws = torch.zeros(self.valid.shape, dtype=torch.float64)
        for row, (seed, count) in enumerate(zip(self.seeds, self.counts, strict=True)):
            digest = hashlib.blake2b(seed.encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            draws[row, :count] = torch.rand(count, generator=generator, dtype=torch.float64)
        # In float32 a tie, one in thousands of images, goes to the lower index.
        return to_device(draws, self.valid.device, finest(self.valid.device))

    @cached_property
    def _key_cache(self) -> dict[int, Tensor]:
        return {}

    def _keys_of(self, source: LayerInput) -> Float[Tensor, "R H L d"]:
        if source.layer not in self._key_cache:
            keys = source.keys
            if keys is None:
                keys = self._parts.keys(source.layer, source.hidden, source.rotary)
            self._key_cache[source.layer] = keys
        return self._key_cache[source.layer]

    @cached_property
    def _values(self) -> Float[Tensor, "R L G d"]:
        source = self._layer_before
        values = self._parts.values(source.layer, source.hidden)
        return values.to(_fine(values)).transpose(1, 2)

    @property
    def _layer_before(self) -> LayerInput:
        if self._before is None:
            self._undeclared("attention")
        return self._before

    @property
    def _input_embeddings(self) -> Float[Tensor, "R L0 D"]:
        if self._embedded is None:
            self._undeclared("embeddings")
        return self._embedded

    def _weights(
        self, layer: int, query: Float[Tensor, "B H Q d"], key: Float[Tensor, "B G L d"], seen: Bool[Tensor, "B Q L"]
    ) -> Float[Tensor, "B H Q L"]:
        """Softmax over the keys that each query sees, in float32 or finer."""
        fine = _fine(key)
        # Grouped heads share their keys: the query heads of a group are adjacent.
        grouped = query.to(fine).unflatten(1, (key.shape[1], -1)) * self._parts.layers[layer].self_attn.scaling
        scores = grouped @ key.to(fine)[:, :, None].transpose(-1, -2)
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).flatten(1, 2)
        return weights.to(self.valid.device)

    def _column_of(self, index: Int[Tensor, "B C"]) -> Int[Tensor, "B C"]:
        """The original columns of raster indices; arbitrary where padding."""
        return self._columns.gather(1, index.clamp(0, self._columns.shape[1] - 1))

    def _of(self, sequence: Shaped[Tensor, "R L *D"], tokens: Tokens) -> Shaped[Tensor, "B N *D"]:
        return sequence.to(self.valid.device)[self.rows[:, None], tokens.slots]

    def _at(self, table: Tensor, tokens: Tokens) -> Tensor:
        """The rows of a rotary table (…, 1 or R, L, d) at `tokens`: (…, B, N, d)."""
        rows = self.rows if table.shape[-3] > 1 else torch.zeros_like(self.rows)
        return table[..., rows.to(table.device)[:, None], tokens.slots.to(table.device), :]

    @staticmethod
    def _recorded_images(run: EncoderRun) -> int:
        """Images of a LLaVA's run whose pixels were not recorded."""
        tensors = [x for x, _ in run.inputs.values()] + list(run.outputs.values())
        return len(tensors[0]) if tensors else 0


def _fine(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
