"""What `lmms-prune calibrate` proposes for the demo's models, taken from docs/finding into lmms_prune/demo/weights.

    python docs/finding.py            # calibrates both models, among other measurements
    python docs/proposals.py          # at once

The demo shows these schedules beside the paper's hybrid at its own depth. A test holds the stored file equal to this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmms_prune.demo.models import MODELS
from lmms_prune.demo.proposals import PROPOSALS

FINDING = Path(__file__).with_name("finding")
STORED = ("schedule", "vanishes", "horizon", "budget", "tasks", "limit", "verified")


def proposals(finding: Path = FINDING) -> dict[str, dict[str, Any]]:
    """By model, what of its calibration is stored: how it was made, and what it loses."""
    stored = {}
    for model in MODELS:
        record = json.loads((finding / model.folder / "calibrate.json").read_text(encoding="utf-8"))
        stored[model.folder] = {name: record[name] for name in STORED}
    return stored


if __name__ == "__main__":
    PROPOSALS.write_text(json.dumps(proposals(), indent=1) + "\n", encoding="utf-8")
