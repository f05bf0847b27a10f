"""Random: uniform, without replacement, over the tokens present; decided by seed, sample, image and layer alone."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest
import torch
from observed import HandView, Tiny, chosen, kept

from lmms_prune.methods.random import Random

# 99.9 % quantiles of the χ² distribution by its degrees of freedom.
CHI2 = {19: 43.82, 31: 61.10, 63: 103.44}


def chi2(observed: list[int], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in observed)


class Drawn(HandView):
    """A view whose draws are given."""

    def uniform(self) -> torch.Tensor:
        return torch.tensor([[0.3, 0.9, 0.1, 0.5, 0.7]])


def test_by_hand() -> None:
    # Keeping the largest N of independent draws is a uniform sample of N: of 0.3, 0.9, 0.1, 0.5, 0.7 the two largest
    # are tokens 1 and 4, the third is token 3.
    view = Drawn(torch.zeros(1, 9, 2), 5)
    assert chosen(Random().select(view, torch.tensor([2]))) == [{1, 4}]
    assert chosen(Random().select(view, torch.tensor([3]))) == [{1, 3, 4}]
    assert chosen(Random().select(view, torch.tensor([5]))) == [{0, 1, 2, 3, 4}]


def test_all_subsets_equally_likely() -> None:
    """χ² over the 20 subsets of 3 of 6 tokens, in 4000 samples with consecutive names."""
    view = HandView(torch.zeros(4000, 9, 2), 6, seeds=[f"0|sample {i}|image 0|layer 3" for i in range(4000)])
    found = Counter(map(frozenset, chosen(Random().select(view, torch.full((4000,), 3)))))
    subsets = [frozenset(subset) for subset in combinations(range(6), 3)]
    assert set(found) <= set(subsets)
    assert chi2([found[subset] for subset in subsets], 200) < CHI2[19]


@pytest.mark.parametrize("sweep", ["seed", "layer", "image"])
def test_neighbouring_seeds_are_independent(sweep: str) -> None:
    """χ² over the pairs (token kept now, token kept next) of 1 of 8... here 1 of 4 tokens twice and parity: 32 cells."""
    names = {
        "seed": [f"{i}|a|image 0|layer 3" for i in range(4001)],
        "layer": [f"0|a|image 0|layer {i}" for i in range(4001)],
        "image": [f"0|a|image {i}|layer 3" for i in range(4001)],
    }[sweep]
    view = HandView(torch.zeros(4001, 11, 2), 8, seeds=names)
    firsts = [next(iter(tokens)) for tokens in chosen(Random().select(view, torch.ones(4001, dtype=torch.long)))]
    pairs = Counter((now, then // 2) for now, then in zip(firsts[::2], firsts[1::2], strict=False))
    assert chi2([pairs[now, half] for now in range(8) for half in range(4)], 2000 / 32) < CHI2[31]


def test_uniform_in_real_runs(all_tiny: dict[str, Tiny]) -> None:
    """Each of LLaVA's 64 tokens is kept equally often: 25 samples, 12 seeds, 16 tokens each."""
    tiny, rng = all_tiny["llava"], random.Random(1)
    picture = tiny.image(rng)
    inputs = tiny.batch([([picture], f"{word} {i}") for i, word in enumerate(["is it red"] * 25)])
    counts: Counter[int] = Counter()
    sets = set()
    for seed in range(12):
        for tokens in kept(tiny.run(inputs, "random@1:0.25", seed=seed, dtype=torch.float64)[0]):
            assert len(tokens) == 16
            counts.update(tokens)
            sets.add(frozenset(tokens))
    assert len(sets) == 300
    # A token's count is binomial(300, 1/4) and the counts sum to a constant: the usual χ², scaled.
    statistic = chi2([counts[token] for token in range(64)], 75) / (1 - 16 / 64) * 63 / 64
    assert statistic < CHI2[63]


def test_second_draw_is_uniform_over_the_survivors(all_tiny: dict[str, Tiny]) -> None:
    """After an earlier stage kept 16 tokens, 8 of these 16 are drawn, whatever their raster indices are."""
    tiny, rng = all_tiny["llava"], random.Random(2)
    inputs = tiny.batch([tiny.row(rng) for _ in range(25)])
    ranks: Counter[int] = Counter()
    for seed in range(8):
        trace, _ = tiny.run(inputs, "divprune@0:16t,random@2:8t", seed=seed)
        for before, after in zip(kept(trace, 0), kept(trace, 1), strict=True):
            assert len(after) == 8
            assert after < before
            ranks.update(sorted(before).index(token) for token in after)
    statistic = chi2([ranks[rank] for rank in range(16)], 100) / (1 - 8 / 16) * 15 / 16
    assert statistic < 37.70  # 99.9 % quantile at 15 degrees of freedom


def test_what_decides_a_draw(tiny: Tiny) -> None:
    rng = random.Random(3)
    same = tiny.row(rng)
    inputs = tiny.batch([same, same, same])
    names = ["a", "b", "a"]

    def draw(schedule: str = "random@2:0.5", seed: int = 0, stage: int = 0) -> list[set[int]]:
        return kept(tiny.run(inputs, schedule, seed=seed, samples=names)[0], stage)

    first = draw()
    assert draw() == first, "reproducible"
    assert first[0] == first[2], "the sample's name decides"
    assert first[0] != first[1], "samples differ"
    assert all(a != b for a, b in zip(first, draw(seed=1), strict=True)), "seeds differ"
    assert all(a != b for a, b in zip(first, draw("random@3:0.5"), strict=True)), "layers differ"
    nested = draw("random@1:0.75,random@2:0.5", stage=1)
    assert all(a != b for a, b in zip(first, nested, strict=True)), "drawn over what is present"


def test_images_of_one_row_have_separate_draws(all_tiny: dict[str, Tiny]) -> None:
    tiny, rng = all_tiny["llava"], random.Random(4)
    picture = tiny.image(rng)
    one, two = kept(tiny.run(tiny.batch([([picture, picture], "is it red")]), "random@2:0.5")[0])
    assert one != two


def test_does_not_touch_the_global_generator(tiny: Tiny) -> None:
    rng = random.Random(5)
    inputs = tiny.batch([tiny.row(rng)])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = kept(tiny.run(inputs, "random@2:0.5")[0])
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert kept(tiny.run(inputs, "random@2:0.5")[0]) == first
