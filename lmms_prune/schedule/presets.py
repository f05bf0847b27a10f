"""Named schedules: the rows of arXiv 2512.07580, as printed in its tables and as counted in its release.

``NAME-192`` and ``NAME-64`` are Table 5 (LLaVA-1.5-7B, average visual tokens per layer), ``NAME-50pct`` is Table 4
(Qwen2.5-VL-7B), ``NAME-192-release`` the exact counts of the authors' evaluation scripts, with DART's pivots in the scripts'
order (``order=reference``; DART alone with the printed ratio). Where script and table disagree on DivPrune+VTW's deep layer
(20 and 21), the table's 21 is taken.

``fitprune-P`` are the published schedules that save P percent of LLaVA-1.5-7B's FLOPs, ``nuwa-B`` the published keeps. For
``swiftvlm-B`` only layers and budgets are published: the keeps, about 2 : 1.5 : 1, are a choice that meets the budget.
``sparsevlm-B`` and ``pdrop-B`` are their authors' lists and rule, which meet B by the authors' accounting: measured,
SparseVLM's average 206.5, 145.4, 114.1 and 82.3 tokens per layer. ``NAME-B-measured`` are schedules of the paper's cost
table (Table 3) that differ from Table 5: FastV acted at layer 4, and DART kept 172 and 36 tokens, with ``order=reference``: the
printed accuracy and times are those of the authors' code, which the default order does not repeat token by token. ``vtw-B`` acts at the layer
that comes nearest to B. ``mustdrop-B`` and ``todre-P`` decide by thresholds: their plan is an upper bound.
``vscan-64`` and, for Qwen2.5-VL, ``vscan-50pct`` and ``vscan-11pct`` are published; ``vscan-128`` and ``vscan-192`` have the
published shares. ``ivcprune-llava`` and, for Qwen2.5-VL-7B, ``ivcprune-50pct`` are the rules of its code. ``scope-N`` keep N
tokens. ``visionzip-N`` keep 162+30, 108+20 and 54+10 tokens (dominant, the class token among them, and contextual).

``NAME-next-N`` are for LLaVA-NeXT with ``unpad=false``, whose image in two by two tiles has 2,880 tokens: N of them. VisPruner
(32 x 5 = 160 in its README), VisionZip and CDPruner (both select in each of CLIP's runs) keep a fixed number in each tile,
whatever the number of tiles: 128, 64 or 32 of 576. SCOPE distributes N over the tiles, VScan keeps 96 and then 32 in each
(320 on average), Nüwa states 1162, 582 and 290 tokens of the image, DART's code keeps 320.
"""

_FITPRUNE = {
    10: "2:1 3:2 4:1 6:1 7:4 8:5 9:5 10:11 11:4 12:2 13:2 16:1 17:1 18:2 19:4 20:2 21:10 22:1 23:1 24:1 25:2 26:1 27:1 29:1",
    20: "2:3 3:3 4:1 5:1 6:4 7:16 8:14 9:15 10:24 11:4 12:2 13:3 14:2 16:6 18:5 19:13 20:4 21:19 22:2 23:1 24:1 25:1 26:1 27:1 28:2 29:1",
    30: "2:7 3:6 4:4 5:5 6:16 7:40 8:24 9:21 10:24 11:4 12:2 13:3 14:4 16:16 18:11 19:26 20:6 21:32 22:3 23:1 25:1 26:2 27:2 28:4",
    40: "1:1 2:21 3:13 4:14 5:11 6:41 7:53 8:29 9:15 10:14 11:5 12:1 13:4 14:5 15:1 16:26 17:1 18:13 19:28 20:6 21:27 22:2 23:1 26:1 27:1 28:2",
    50: "0:3 1:7 2:49 3:24 4:29 5:17 6:59 7:41 8:26 9:8 10:10 11:6 12:2 13:5 14:7 15:2 16:30 17:3 18:13 19:27 20:5 21:23 22:2 23:1 26:1 27:1 28:2",
    55: "0:6 1:17 2:69 3:31 4:34 5:19 6:59 7:30 8:23 9:6 10:8 11:7 12:2 13:5 14:8 15:2 16:29 17:4 18:12 19:25 20:4 21:19 22:2 23:1 26:1 28:1",
    60: "0:14 1:33 2:89 3:36 4:36 5:20 6:55 7:21 8:18 9:4 10:7 11:5 12:2 13:5 14:7 15:4 16:26 17:5 18:11 19:24 20:4 21:18 22:2 23:1 26:1 28:1",
    70: "0:48 1:79 2:118 3:41 4:33 5:17 6:36 7:9 8:9 9:2 10:3 11:2 12:1 13:3 14:4 15:8 16:18 17:7 18:8 19:20 20:4 21:13 22:2 23:1 26:1 28:1",
    80: "0:128 1:127 2:118 3:35 4:26 5:8 6:13 7:3 8:2 9:1 13:2 14:1 15:8 16:7 17:8 18:5 19:11 20:2 21:6 22:1 23:1 27:1",
    90: "0:262 1:153 2:80 3:19 4:13 5:1 6:2 15:1 16:1 17:2 18:1 19:2 21:1 27:1",
}
"""Published deletions of FitPrune for LLaVA-1.5-7B (576 tokens), "layer:deleted", by the percent of FLOPs saved."""

_BY_TILE = ("visionzip", "vispruner", "cdpruner")
_OF_576 = {640: "0.2222", 320: "0.1111", 160: "0.0556"}
"""The share of a tile's 576 tokens, by the tokens of five tiles: 128, 64 and 32 tokens."""


def _fitprune(deletions: str, tokens: int = 576) -> str:
    """The schedule of these deletions: tokens deleted inside layer i, after its attention, are dropped before layer i+1."""
    stages = []
    for entry in deletions.split():
        layer, deleted = map(int, entry.split(":"))
        tokens -= deleted
        stages.append(f"fitprune@{layer + 1}:{tokens}t")
    return ",".join(stages)


PRESETS: dict[str, str] = {
    "dart-192": "dart@2:0.29",
    "dart+vtw-192": "dart@2:0.44,vtw@21",
    "dart+random-192": "dart@2:0.44,random@20:0.07",
    "divprune-192": "divprune@0:0.33",
    "divprune+vtw-192": "divprune@0:0.49,vtw@21",
    "divprune+random-192": "divprune@0:0.49,random@20:0.07",
    "fastv-192": "fastv@3:0.26",
    "fastv+vtw-192": "fastv@3:0.41,vtw@21",
    "fastv+random-192": "fastv@3:0.41,random@20:0.06",
    "dart-64": "dart@2:0.05",
    "dart+vtw-64": "dart@1:0.10,vtw@26",
    "dart+random-64": "dart@1:0.10,random@20:0.05",
    "divprune-64": "divprune@0:0.11",
    "divprune+vtw-64": "divprune@0:0.17,vtw@21",
    "divprune+random-64": "divprune@0:0.17,random@20:0.02",
    "fastv-64": "fastv@3:0.02",
    "fastv+vtw-64": "fastv@2:0.06,vtw@26",
    "fastv+random-64": "fastv@2:0.06,random@20:0.03",
    "dart-50pct": "dart@2:0.46",
    "dart+vtw-50pct": "dart@2:0.49,vtw@26",
    "dart+random-50pct": "dart@2:0.49,random@25:0.25",
    "divprune-50pct": "divprune@0:0.50",
    "divprune+vtw-50pct": "divprune@0:0.53,vtw@26",
    "divprune+random-50pct": "divprune@0:0.53,random@25:0.25",
    "dart-192-release": "dart@2:0.29;order=reference",
    "dart-64-release": "dart@2:0.05;order=reference",
    "dart+random-192-release": "dart@2:252t;order=reference,random@20:38t",
    "dart+random-64-release": "dart@1:60t;order=reference,random@20:27t",
    "dart+vtw-192-release": "dart@2:260t;order=reference,vtw@21",
    "dart+vtw-64-release": "dart@1:60t;order=reference,vtw@26",
    "divprune+random-192-release": "divprune@0:284t,random@20:38t",
    "divprune+random-64-release": "divprune@0:96t,random@20:10t",
    "divprune+vtw-192-release": "divprune@0:284t,vtw@21",
    "divprune+vtw-64-release": "divprune@0:98t,vtw@21",
    "dart-192-measured": "dart@2:172t;order=reference",
    "dart-64-measured": "dart@2:36t;order=reference",
    "fastv-192-measured": "fastv@4:148t",
    "fastv-64-measured": "fastv@4:11t",
    "vtw-192": "vtw@11",
    "vtw-128": "vtw@7",
    "vtw-64": "vtw@4",
    "pdrop-270": "pdrop@8:288t,pdrop@16:144t,pdrop@24:72t",
    "pdrop-192": "pdrop@2:322t,pdrop@8:180t,pdrop@16:100t",
    "pdrop-128": "pdrop@2:241t,pdrop@8:101t,pdrop@16:42t",
    "pdrop-64": "pdrop@2:110t,pdrop@8:21t,pdrop@16:4t",
    "scope-192": "scope@0:192t",
    "scope-128": "scope@0:128t",
    "scope-64": "scope@0:64t",
    "visionzip-192": "visionzip@0:192t",
    "visionzip-128": "visionzip@0:128t",
    "visionzip-64": "visionzip@0:64t",
    "vscan-192": "vscan@0:288t,vscan@16:96t",
    "vscan-128": "vscan@0:192t,vscan@16:64t",
    "vscan-64": "vscan@0:96t,vscan@16:32t",
    # The ratios at layer 14 are of the tokens still present; here they are multiplied out: 0.333 and 0.67 of them.
    "vscan-50pct": "vscan@0:0.6,vscan@14:0.402;rope=false",
    "vscan-11pct": "vscan@0:0.167,vscan@14:0.055611;rope=false",
    "ivcprune-llava": "ivcprune@16;rule=union",
    "ivcprune-50pct": "ivcprune@16",
    "sparsevlm-192": "sparsevlm@3:300t,sparsevlm@7:200t,sparsevlm@16:110t",
    "sparsevlm-128": "sparsevlm@3:303t,sparsevlm@7:110t,sparsevlm@16:36t",
    "sparsevlm-96": "sparsevlm@3:238t,sparsevlm@7:48t,sparsevlm@16:26t",
    "sparsevlm-64": "sparsevlm@3:66t,sparsevlm@7:30t,sparsevlm@16:17t",
    "sparsevlm-v2-192": "sparsevlm@3:300t;version=v2.0,sparsevlm@7:200t;version=v2.0,sparsevlm@16:118t;version=v2.0",
    "sparsevlm-v2-128": "sparsevlm@3:238t;version=v2.0,sparsevlm@7:108t;version=v2.0,sparsevlm@16:60t;version=v2.0",
    "sparsevlm-v2-96": "sparsevlm@3:246t;version=v2.0,sparsevlm@7:54t;version=v2.0,sparsevlm@16:28t;version=v2.0",
    "sparsevlm-v2-64": "sparsevlm@3:66t;version=v2.0,sparsevlm@7:34t;version=v2.0,sparsevlm@16:20t;version=v2.0",
    **{f"{name}-next-{n}": f"{name}@0:{share};per=tile" for name in _BY_TILE for n, share in _OF_576.items()},
    **{f"scope-next-{n}": f"scope@0:{n}t;per=tile" for n in _OF_576},
    "vscan-next-320": "vscan@0:0.1667;per=tile,vscan@16:0.0556;per=tile",
    "nuwa-next-640": "nuwa@0:1162t,nuwa@16:116t",
    "nuwa-next-320": "nuwa@0:582t,nuwa@16:58t",
    "nuwa-next-160": "nuwa@0:290t,nuwa@16:29t",
    "dart-next-320": "dart@2:320t",
    "mustdrop-192": "mustdrop@0,mustdrop@3,mustdrop@7,mustdrop@11,mustdrop@15",
    "mustdrop-128": "mustdrop@0,mustdrop@3;theta_g=0.0012,mustdrop@7;theta_g=0.0012,mustdrop@11;theta_g=0.0012,mustdrop@15;theta_g=0.0012",
    "mustdrop-64": "mustdrop@0,mustdrop@3;theta_g=0.011;theta_i=0.01,mustdrop@7;theta_g=0.011;theta_i=0.01,mustdrop@11;theta_g=0.011;theta_i=0.01,mustdrop@15;theta_g=0.011;theta_i=0.01",
    "todre-25": "todre@0:0.25,todre@28",
    "todre-10": "todre@0:0.10,todre@28",
    "swiftvlm-192": "swiftvlm@3:232t,swiftvlm@10:176t,swiftvlm@14:116t",
    "swiftvlm-128": "swiftvlm@3:124t,swiftvlm@10:96t,swiftvlm@14:62t",
    "nuwa-192": "nuwa@0:336t,nuwa@16:48t",
    "nuwa-128": "nuwa@0:224t,nuwa@16:32t",
    "nuwa-64": "nuwa@0:112t,nuwa@16:16t",
    **{f"fitprune-{percent}": _fitprune(deletions) for percent, deletions in _FITPRUNE.items()},
    # The ratios at LLaVA-OneVision's layers 9 and 18 are of the tokens still present; here they are multiplied out to the
    # original tokens (at 10 %, layer 9 keeps all).
    "vflowopt-50": "vflowopt@0:0.7233,vflowopt@9:0.5415,vflowopt@18:0.2637",
    "vflowopt-25": "vflowopt@0:0.2651;t=34.76;m=15.58,vflowopt@9:0.2607;t=34.76,vflowopt@18:0.2287;t=34.76",
    "vflowopt-10": "vflowopt@0:0.1166;t=39.265;m=17.387,vflowopt@18:0.0701;t=39.265",
}
