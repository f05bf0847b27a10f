"""What the paper claims in its tables and figures: the claims of each kind of item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from lmms_prune.reproduce.evidence import Evidence
from lmms_prune.reproduce.information_claims import (
    horizon_findings,
    kept_findings,
    vanishing_findings,
    variance_findings,
)
from lmms_prune.reproduce.items import Item
from lmms_prune.reproduce.layer_claims import method_findings, oracle_findings
from lmms_prune.reproduce.marks import Verdict
from lmms_prune.reproduce.table_claims import table_findings

BY_KIND: Mapping[str, Callable[[Item, Evidence], Iterator[Verdict]]] = {
    "scores": table_findings,
    "methods": method_findings,
    "kept": kept_findings,
    "oracle": oracle_findings,
    "variance": variance_findings,
    "vanishing": vanishing_findings,
    "horizons": horizon_findings,
}
