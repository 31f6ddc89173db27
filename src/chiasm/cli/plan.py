"""``chiasm plan``: which layout, and how many instances of each role, for given devices, requests and limits of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chiasm.cli.instance import MODEL_HELP
from chiasm.cli.parser import Parser
from chiasm.options import fields_from
from chiasm.plan.run import PlanConfig

_DESCRIPTION = """\
Say by simulation which layout, and how many instances of each role, answer most
requests in time.

  chiasm plan Qwen2.5-VL-7B-Instruct --devices 8xH100 --mix mixed \\
      --rate 40 --ttft-slo 1 --tpot-slo 0.05
  chiasm plan demo --devices cpu:2 --trace requests.jsonl \\
      --ttft-slo 2 --tpot-slo 0.1

Costs of this machine's cores are measured once; those of GPUs are computed,
also where there are none.
The exit code is 1 if no layout answers 90 % in time.
"""


def parser() -> Parser:
    made = Parser("plan", "MODEL [OPTIONS]", _DESCRIPTION)
    made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    made.add("plan", PlanConfig)
    return made


def run(settings: Mapping[str, Any]) -> int | None:
    from chiasm.plan.run import run as run_plan

    return run_plan(PlanConfig(settings["model"], **fields_from(settings, PlanConfig)))
