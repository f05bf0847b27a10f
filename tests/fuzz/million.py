"""Tries a million schedule texts: ``python tests/fuzz/million.py --cases 1000000``; prints what was read and refused."""

from __future__ import annotations

import argparse
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from random import Random

from schedule_texts import anything, mutated, read_or_refused, valid

SHOWN = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Try that many texts, a third of each kind.

    Raises:
        SystemExit: 1 if some text was neither read nor refused as it should be; each is printed.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    draw, counts, start, slowest = Random(options.seed), Counter[str](), time.perf_counter(), 0.0
    for case in range(options.cases):
        kind = (valid, mutated, anything)[case % 3]
        text, began = kind(draw), time.perf_counter()
        try:
            said = "read" if read_or_refused(text) else "refused"
            if kind is valid:
                assert said == "read", text
        except Exception:  # the point of the exercise
            said = "failed"
            if counts["failed"] < SHOWN:
                print(f"{text[:200]!r}\n{traceback.format_exc(limit=-2)}")
        counts[said] += 1
        counts[f"{kind.__name__}, {said}"] += 1
        slowest = max(slowest, time.perf_counter() - began)
    parts = ", ".join(f"{counts[name]:,} {name}" for name in sorted(counts) if ", " in name)
    print(
        f"{options.cases:,} schedule texts, seed {options.seed}: {counts['read']:,} read, {counts['refused']:,} refused "
        f"({parts}), {counts['failed']} failures; {time.perf_counter() - start:.0f} s, slowest {1000 * slowest:.1f} ms"
    )
    if counts["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
