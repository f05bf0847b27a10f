"""Checks that the libraries can be imported and have the required names, and that CUDA and FlashAttention compute.

They run inside a process of lmms-eval, which imports the libraries anyway; if it ends before, they run by
``python -m lmms_prune.certificate.libraries``. Each check is printed on its own line as soon as it is known, so that a
library that ends the process does not lose earlier checks.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from lmms_prune.compat.versions import VERSIONS
from lmms_prune.harness.installation import InstallationCheck, fixing_command, reinstall

_MODULES = {"torch": "torch", "transformers": "transformers", "lmms-eval": "lmms_eval.__main__"}
"""The module imported of each package; each package needs the ones before it."""
_PRINTED = "lmms-prune: check: "
# torch's messages on a machine without a GPU, where there is nothing to fix.
_NO_DEVICE = ("Found no NVIDIA driver", "No CUDA GPUs are available")


def libraries(
    command: Sequence[str] = (sys.executable, "-m", "lmms_prune.certificate.libraries"),
) -> list[InstallationCheck]:
    """Run all checks of this module in their own process; a crash of the process is a failed check."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    checks = printed(done.stdout)
    if done.returncode:
        last_words = " ".join(done.stderr.strip().splitlines()[-1:])
        detail = f"the process that looks at the libraries ended with exit code {done.returncode}: {last_words}"
        checks.append(InstallationCheck("libraries", "failed", detail, reinstall("torch")))
    return checks


def printed(text: str) -> list[InstallationCheck]:
    """Return the checks in a process's output."""
    lines = [line.removeprefix(_PRINTED) for line in text.splitlines() if line.startswith(_PRINTED)]
    return [InstallationCheck(**json.loads(line)) for line in lines]


@cache
def print_checks() -> None:
    """Make all checks, once a process, and print each when it is known."""
    usable = True
    for check in imported():
        print(_PRINTED + json.dumps(asdict(check)), flush=True)
        usable = usable and not (check.what == "import of torch" and check.state == "failed")
    for what, examine in (("CUDA", cuda), ("FlashAttention", flash_attention)):
        check = examine() if usable else InstallationCheck(what, "failed", "cannot be examined without torch")
        print(_PRINTED + json.dumps(asdict(check)), flush=True)


def imported() -> Iterator[InstallationCheck]:
    """Check that each library can be imported and has all names of the tables in `lmms_prune.compat`."""
    broken = None
    for package, module in _MODULES.items():
        what = f"import of {package}"
        if broken is not None:
            yield InstallationCheck(what, "failed", f"cannot be examined without {broken}")
            continue
        try:
            import_module(module)
            tables = {table.package: table for table in import_module("lmms_prune.compat.installed").LIBRARIES}
            moved = list(tables[package].moved())
        except Exception as error:  # whatever an import raises is what was asked
            yield InstallationCheck(
                what, "failed", f"{type(error).__name__}: {error}", fixing_command(str(error), package)
            )
            broken = package
            continue
        count = sum(len(row.names) for row in tables[package].names)
        if moved:
            yield InstallationCheck(what, "failed", "\n".join(moved), reinstall(package))
        else:
            yield InstallationCheck(what, "ok", f"all {count} names that are relied on are there")


def cuda() -> InstallationCheck:
    """Check that torch computes on each CUDA device, if there are any."""
    import torch

    fix = f"pip install --force-reinstall 'torch{VERSIONS['torch']}' torchvision"
    if torch.version.cuda is None:
        detail = f"torch {torch.__version__} is built without CUDA"
        gpus = _gpus()
        return (
            InstallationCheck("CUDA", "failed", f"{detail}, though there is {gpus}", fix)
            if gpus
            else _absent("CUDA", detail)
        )
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
        for device in range(count):
            ones = torch.ones(64, 64, device=f"cuda:{device}", dtype=torch.bfloat16)
            if (total := (ones @ ones).sum().item()) != 64**3:
                return InstallationCheck(
                    "CUDA", "failed", f"cuda:{device}: a product of ones is {total}, not {64**3}", fix
                )
    except (RuntimeError, AssertionError) as error:  # torch's own errors of CUDA, out of memory among them
        # Its first sentence; the next ones are advice, with addresses.
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        return (
            _absent("CUDA", reason)
            if reason.startswith(_NO_DEVICE)
            else InstallationCheck("CUDA", "failed", reason, fix)
        )
    names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(device) for device in range(count)))
    return InstallationCheck("CUDA", "ok", f"{count} × {names}, CUDA {torch.version.cuda}")


def flash_attention() -> InstallationCheck:
    """Check that FlashAttention, if installed, computes the same as torch's attention."""
    what = "FlashAttention"
    try:
        installed = version("flash-attn")
    except PackageNotFoundError:
        return _absent(what, "is not installed; torch's own attention is used")
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attention

    fix = f"pip install --force-reinstall --no-deps --no-build-isolation flash-attn=={installed}"
    try:
        compute = import_module("flash_attn").flash_attn_func
        if not torch.cuda.is_available():
            return _absent(what, f"{installed} is installed, but there is no CUDA device")
        query, key, value = torch.randn(3, 1, 64, 4, 64, device="cuda", dtype=torch.bfloat16)
        heads = [x.transpose(1, 2) for x in (query, key, value)]
        expected = attention(heads[0], heads[1], heads[2], is_causal=True).transpose(1, 2)
        apart = (compute(query, key, value, causal=True) - expected).abs().max().item()
    except Exception as error:  # an extension that was built for another torch raises anything
        return InstallationCheck(what, "failed", f"{installed}: {type(error).__name__}: {error}", fix)
    if not apart < 0.05:
        return InstallationCheck(what, "failed", f"{installed}: its outputs are {apart:.2g} off those of torch", fix)
    return InstallationCheck(what, "ok", installed)


def _absent(what: str, detail: str) -> InstallationCheck:
    return InstallationCheck(what, "not there", detail)


def _gpus() -> str:
    """The GPUs that the driver lists; "" without any, or without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    done = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return "" if done.returncode else ", ".join(done.stdout.splitlines())


if __name__ == "__main__":
    print_checks()
