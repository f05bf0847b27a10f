"""Named schedules: the rows of arXiv 2512.07580, as printed in its tables and as counted in its release.

``NAME-192`` and ``NAME-64`` are Table 5 (LLaVA-1.5-7B, average visual tokens per layer), ``NAME-50pct`` is Table 4
(Qwen2.5-VL-7B), ``NAME-192-release`` the exact counts of the authors' evaluation scripts. Where script and table
disagree on DivPrune+VTW's deep layer (20 and 21), the table's 21 is taken.
"""

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
    "dart+random-192-release": "dart@2:252t,random@20:38t",
    "dart+random-64-release": "dart@1:60t,random@20:27t",
    "dart+vtw-192-release": "dart@2:260t,vtw@21",
    "dart+vtw-64-release": "dart@1:60t,vtw@26",
    "divprune+random-192-release": "divprune@0:284t,random@20:38t",
    "divprune+random-64-release": "divprune@0:96t,random@20:10t",
    "divprune+vtw-192-release": "divprune@0:284t,vtw@21",
    "divprune+vtw-64-release": "divprune@0:98t,vtw@21",
}
