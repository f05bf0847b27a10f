"""What a measurement depends on: the card, its driver, the libraries and this package's code.

``python -m lmms_prune.bench.machine DEVICE`` prints it as JSON. It runs as a process of its own, because a process that
asks for a card's name keeps some of the card's memory.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from lmms_prune import __version__
from lmms_prune.bench.models import existing_device
from lmms_prune.harness.arguments import ArgumentError
from lmms_prune.harness.checkout import code_state
from lmms_prune.harness.circumstances import circumstances


def facts(device: str) -> dict[str, str]:
    """Return all facts about the machine, by name.

    Raises:
        ArgumentError: there is no such device.
    """
    torch_device = existing_device(device)
    machine = circumstances(1, 1)
    card = {"card": "none, on the CPU"}
    if torch_device.type == "cuda":
        properties = torch.cuda.get_device_properties(torch_device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        card = {"card": f"{properties.name}, {memory}", "driver": _driver(), "CUDA": str(torch.version.cuda)}
    packages = {name: _version(name) for name in ("torch", "transformers", "lmms-eval", "flash-attn")}
    return {
        **card,
        "machine": str(machine.machine),
        "threads": str(machine.threads),
        "Python": platform.python_version(),
        **packages,
        "lmms-prune": " ".join(filter(None, [__version__, code_state()])),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """Return the driver's version, which torch does not know."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.split() or ["unknown"])[0]


if __name__ == "__main__":
    try:
        print(json.dumps(facts(sys.argv[1])))
    except ArgumentError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
