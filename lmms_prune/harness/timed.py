"""lmms-eval's command, with the CPU time that it used after its imports printed as the last line.

``python -m lmms_prune.harness.timed …`` takes lmms-eval's options. Elapsed time on a busy machine is no measure.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import entry_points

CPU_SECONDS = "lmms-prune: CPU seconds: "


def main() -> None:
    """Run lmms-eval's command in this process, and print its CPU time, all threads together."""
    (program,) = entry_points(group="console_scripts", name="lmms-eval")
    evaluate = program.load()
    sys.argv[0] = "lmms-eval"
    start = time.process_time()
    try:
        evaluate()
    finally:
        print(f"\n{CPU_SECONDS}{time.process_time() - start}", flush=True)


if __name__ == "__main__":
    main()
