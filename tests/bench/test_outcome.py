"""Targets, and what a run prints and writes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from chiasm.bench import synthetic
from chiasm.bench.client import opened
from chiasm.bench.measurement import Bench, Curves, Figure, Measurement, Outcome, Panel, Series, TimeLines
from chiasm.bench.measurements import MEASUREMENTS
from chiasm.bench.measurements.identity import Tokens, compare, generated
from chiasm.bench.plot import write_plot
from chiasm.bench.report import machine, print_outcome, shown, with_unit, write_json
from chiasm.bench.requests import DrawnRequest
from chiasm.bench.statistics import Estimate
from chiasm.cli.bench import NAMES
from chiasm.launch.config import EngineKind


class _Asked(Measurement):
    name, purpose, target = "asked", "a question", "a target"

    async def run(self, bench: Bench) -> Outcome:
        return Outcome()


@pytest.fixture
def outcomes() -> dict[str, Outcome]:
    ttft = Outcome(
        figures=[
            Figure.of("E+PD / aggregated", Estimate(1.04, 1.01, 1.09), "x", at_most=1.1),
            Figure("p99 of the gaps", 12.0, "ms", 10.0),
            Figure("text", 3.25, "ms"),
        ],
        panels=[
            Panel("ttft", "ms", [Series("aggregated", [10.0, 11.0, 12.0]), Series("E+PD", [10.5, 11.4, 12.9], 12.1)]),
            Panel("gaps", "ms", [Series("aggregated", [1.0, 2.0, 50.0], 4.0)], tail=True, logarithmic=True),
            Panel("one", "ms", [Series("single", [1.0])]),
        ],
        notes=["3 pairs [of] requests"],
    )
    return {"ttft": ttft, "identity": Outcome(figures=[Figure("differ", 0, "", 0)])}


def test_a_value_equal_to_its_target_meets_it() -> None:
    assert Figure("a", 1.1, "x", 1.1).met is True
    assert Figure("a", 1.11, "x", 1.1).met is False
    assert Figure("a", 0, "", 0).met is True
    assert Figure("a", 5).met is None


def test_larger_values_meet_a_target_that_is_a_minimum() -> None:
    assert Figure("a", 1.1, "x", at_least=1.1).met is True
    assert Figure.of("a", Estimate(1.05, 1.0, 1.2), "x", at_least=1.1).met is False


def test_an_outcome_meets_its_target_when_all_figures_do(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["identity"].met is True
    assert outcomes["ttft"].met is False
    assert Outcome(figures=[Figure("a", 5)]).met is None


def test_values_are_shown_with_three_significant_digits() -> None:
    assert [shown(value) for value in (0, 0.012345, 1.5, 12.345, 123.45)] == ["0", "0.0123", "1.5", "12.3", "123"]
    assert with_unit(1.0444, "x") == "1.04x"
    assert with_unit(3, "") == "3"
    assert with_unit(2.5, "ms") == "2.5 ms"


def test_the_table_shows_values_targets_and_whether_they_are_met(outcomes: dict[str, Outcome]) -> None:
    file = io.StringIO()
    print_outcome(Console(file=file, width=120), _Asked(), outcomes["ttft"])
    lines = file.getvalue().splitlines()
    (met,) = (line for line in lines if "E+PD / aggregated" in line)
    (missed,) = (line for line in lines if "p99 of the gaps" in line)
    assert "1.04x" in met
    assert "1.01 … 1.09" in met
    assert "≤ 1.10x" in met
    assert "yes" in met
    assert "12 ms" in missed
    assert "no" in missed
    assert any("3 pairs [of] requests" in line for line in lines)


def test_the_table_shows_a_minimum() -> None:
    file = io.StringIO()
    outcome = Outcome(figures=[Figure("requests per second", 1.25, "x", at_least=1.1)])
    print_outcome(Console(file=file, width=120), _Asked(), outcome)
    (line,) = (line for line in file.getvalue().splitlines() if "requests per second" in line)
    assert "≥ 1.10x" in line
    assert "yes" in line


def test_the_json_has_every_sample_and_whether_targets_are_met(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", outcomes, {"seed": 3, "machine": machine()})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["seed"] == 3
    assert found["machine"]["cores"] >= 1
    ttft = found["measurements"]["ttft"]
    assert ttft["met"] is False
    assert [figure["met"] for figure in ttft["figures"]] == [True, False, None]
    assert ttft["panels"][0]["series"][1] == {"label": "E+PD", "values": [10.5, 11.4, 12.9], "at_most": 12.1}


def test_the_plot_is_an_image_large_enough_to_read(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    write_plot(tmp_path / "results.png", outcomes, "a run")
    with Image.open(tmp_path / "results.png") as image:
        assert image.format == "PNG"
        assert image.width >= 1000
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_minimum_targets_are_drawn(tmp_path: Path) -> None:
    figures = [
        Figure.of("met", Estimate(1.3, 1.2, 1.4), "x", at_least=1.1),
        Figure.of("of chance", Estimate(1.3, 0.0, 1.4), "x", at_least=1.1),
        Figure("nothing", 0.0, "x", at_least=1.1),
    ]
    write_plot(tmp_path / "results.png", {"example": Outcome(figures=figures)}, "a run")
    with Image.open(tmp_path / "results.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_a_plot_without_targets_has_no_room_for_them(tmp_path: Path) -> None:
    panels: list[Panel | Curves | TimeLines] = [Panel("first token", "ms", [Series("vLLM", [1.0, 2.0])])]
    heights = []
    for figures in ([], [Figure("ratio", 1.0, "x", 1.1)]):
        write_plot(tmp_path / "results.png", {"engines": Outcome(figures=figures, panels=panels)}, "a run")
        with Image.open(tmp_path / "results.png") as image:
            heights.append(image.height)
    assert heights[0] < heights[1]


def test_a_run_without_samples_has_a_plot(tmp_path: Path) -> None:
    write_plot(tmp_path / "results.png", {"identity": Outcome()}, "a run")
    assert (tmp_path / "results.png").stat().st_size > 0


REQUESTS = [DrawnRequest("text", (), "one?"), DrawnRequest("text", (), "two?")]
ANSWERS = [["a", "b"], ["c"]]


def _compared(label: str, answers: dict[str, Tokens], generated: Tokens | None = None) -> Outcome:
    outcome = Outcome()
    compare(outcome, label, REQUESTS, answers, generated)
    return outcome


def test_a_single_different_answer_makes_the_outcome_wrong() -> None:
    same = _compared("greedy", {"aggregated": ANSWERS, "E+PD": ANSWERS}, ANSWERS)
    assert not same.wrong
    assert same.met is True
    different = _compared("greedy", {"aggregated": ANSWERS, "E+PD": [["a", "b"], ["d"]]}, ANSWERS)
    assert different.wrong
    assert {figure.name: figure.value for figure in different.figures} == {
        "greedy, answers that differ: E+PD and aggregated": 1,
        "greedy, answers that differ: aggregated and generate": 0,
        "greedy, answers that differ: E+PD and generate": 1,
    }
    assert any("two?" in note and "'d'" in note and "'c'" in note for note in different.notes)


def test_without_generated_answers_the_topologies_are_compared_with_aggregated() -> None:
    outcome = _compared("sampled", {"aggregated": ANSWERS, "E+PD": ANSWERS, "E+P+D (X)": [["a"], ["c"]]})
    assert outcome.wrong
    assert {figure.name: figure.value for figure in outcome.figures} == {
        "sampled, answers that differ: E+PD and aggregated": 0,
        "sampled, answers that differ: E+P+D (X) and aggregated": 1,
    }


async def test_without_a_reference_for_the_family_a_note_says_so(tmp_path: Path) -> None:
    folder = synthetic.make("internvl", tmp_path / "internvl")
    outcome = Outcome()
    async with opened() as client:
        assert await generated(Bench(str(folder), tmp_path, client), outcome, folder, REQUESTS) is None
    (note,) = outcome.notes
    assert note.startswith("No reference")


def test_every_measurement_has_a_name_a_purpose_and_a_target() -> None:
    for measurements in MEASUREMENTS.values():
        for name, measurement in measurements.items():
            assert measurement.name == name
            assert measurement.purpose
            assert measurement.target


def _by_name() -> str:
    *others, last = (name for name, one in MEASUREMENTS[EngineKind.CHIASM].items() if one.only_by_name)
    return f"{', '.join(others)} and {last}"


def test_the_help_and_the_documentation_list_all_measurements() -> None:
    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    names = dict.fromkeys(name for measurements in MEASUREMENTS.values() for name in measurements)
    assert [line.removeprefix("### ") for line in page.splitlines() if line.startswith("### ")] == list(names)
    assert (
        f"Measurements to run (default: all but {_by_name()}): {', '.join(MEASUREMENTS[EngineKind.CHIASM])}; "
        f"with --engine vllm: {', '.join(MEASUREMENTS[EngineKind.VLLM])}."
    ) == NAMES
