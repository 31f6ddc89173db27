"""``chiasm plan`` as a person uses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chiasm.cli import plan
from chiasm.errors import ConfigurationError
from chiasm.plan.costs import MeasuredFile, ThreadCosts, write_costs
from tests.cli.running import run

MODEL = "Qwen2.5-VL-7B-Instruct"
IN_TIME = ("--ttft-slo", "1", "--tpot-slo", "0.05")
MIX = ("--mix", "mixed", "--requests", "20")


def planned(*arguments: str) -> int | None:
    return plan.run(plan.parser().parse(arguments))


@pytest.fixture
def costs(tmp_path: Path) -> Path:
    """Costs of the demo model on one core, as if they had been measured."""
    measured = MeasuredFile(
        model="demo",
        cpu="some",
        cores=1,
        threads={1: ThreadCosts([(1, 0.002), (100, 0.01)], 1e-8, 1e-7, [(100, 0.02)])},
        prepare=[(100, 0.001), (1000, 0.002)],
        embedding_seconds_per_token=1e-6,
        kv_seconds_per_token=1e-6,
        request_seconds=0.001,
        busy_factor=1.0,
    )
    write_costs(tmp_path / "costs.json", measured)
    return tmp_path / "costs.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MODEL, "--devices", "2xTPU", *MIX, *IN_TIME), "no figures for 'TPU'"),
        ((MODEL, "--devices", "2xH100", "--mix", "salad", *IN_TIME), "no mix 'salad'"),
        ((MODEL, "--devices", "2xH100", *IN_TIME), "either --mix NAME or --trace FILE"),
        (
            (MODEL, "--devices", "2xH100", "--mix", "text", "--trace", "x", *IN_TIME),
            "either --mix NAME or --trace FILE",
        ),
        ((MODEL, "--devices", "2xH100", *MIX), "--ttft-slo and --tpot-slo"),
        ((MODEL, "--devices", "2xH100", *MIX, "--ttft-slo", "1"), "--ttft-slo and --tpot-slo"),
        ((MODEL, "--devices", "2xH100", *MIX, *IN_TIME, "--rate", "-1"), "--rate"),
        ((MODEL, "--devices", "2xH100", *MIX, *IN_TIME, "--rate", "0"), "--rate"),
        ((MODEL, "--devices", "2xH100", *MIX, *IN_TIME, "--rate", "nan"), "--rate"),
        ((MODEL, "--devices", "2xH100", *MIX, "--ttft-slo", "-1", "--tpot-slo", "1"), "--ttft-slo"),
        ((MODEL, "--devices", "2xH100", *MIX, *IN_TIME, "--calibrate"), "this machine's cores"),
        (("owner/no-such-model", "--devices", "2xH100", *MIX, *IN_TIME), "'owner/no-such-model' is not known"),
        ((MODEL, "--devices", "1xL4", "--mix", "text", "--ttft-slo", "1"), "--ttft-slo and --tpot-slo"),
        (("llava-1.5-7b-hf", "--devices", "1xL4", "--check", "none"), "--devices cpu:N"),
        (("demo", "--check", "none", "--mix", "text", "--plot", "x", "--seed", "1"), "leave out --mix, --plot, --seed"),
        ((MODEL, "--trace", "none", *IN_TIME, "--requests", "9", "--seed", "1"), "leave out --requests and --seed"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        planned(*arguments)


def test_a_wrong_use_ends_with_exit_code_2() -> None:
    done = run("plan", MODEL, "--devices", "2xTPU", *MIX, *IN_TIME)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: --devices: there are no figures for 'TPU'")


def test_a_plan_names_the_layout_and_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(MODEL, "--devices", "2xH100", *MIX, *IN_TIME, "--rate", "5") == 0
    printed = capsys.readouterr().out
    assert "On 2xH100 use " in printed
    assert f"  chiasm serve Qwen/{MODEL} --layout " in printed


def test_costs_that_could_not_be_kept_are_not_measured(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    kept = str(tmp_path / "a file" / "costs.json")
    with pytest.raises(
        ConfigurationError, match=r"cannot be written to .*costs.json: .*\. Name another file with --costs"
    ):
        planned("demo", "--devices", "cpu:1", *MIX, *IN_TIME, "--costs", kept)


def test_limits_that_nothing_meets_are_said_and_give_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(MODEL, "--devices", "1xL4", *MIX, "--ttft-slo", "0.001", "--tpot-slo", "0.05") == 1
    assert "Nothing on 1xL4 answers 90% of mixed in time" in capsys.readouterr().out


def trace(folder: Path, *lines: str) -> str:
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return str(folder / "mine.jsonl")


def test_a_trace_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        json.dumps({"time": number / 2, "prompt_tokens": 50, "images": [[640, 480]], "answer_tokens": 5})
        for number in range(21)
    ]
    assert planned(MODEL, "--devices", "1xH100", "--trace", trace(tmp_path, *lines), *IN_TIME) == 0
    assert "of mine in time up to" in (printed := " ".join(capsys.readouterr().out.split()))
    assert "(the trace has 2)" in printed


def test_nonsense_in_a_trace_is_refused(tmp_path: Path) -> None:
    lines = trace(tmp_path, '{"time": 0, "prompt_tokens": 5, "answer_tokens": 1}', '{"time": "soon"}')
    with pytest.raises(ConfigurationError, match="line 2"):
        planned(MODEL, "--devices", "1xH100", "--trace", lines, *IN_TIME)


def test_json_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    planned(MODEL, "--devices", "1xH100", *MIX, *IN_TIME, "--rate", "5", "--json")
    found = json.loads(capsys.readouterr().out)
    assert [one["layout"] for one in found["candidates"]] == ["aggregated", "colocated"]


@pytest.mark.parametrize("name", ["plan.png", "plan.of-today"])
def test_a_plot_is_written(tmp_path: Path, name: str) -> None:
    planned(MODEL, "--devices", "1xH100", *MIX, *IN_TIME, "--rate", "5", "--plot", str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_measured_costs_are_taken_from_their_file(costs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned("demo", "--devices", "cpu:1", *MIX, *IN_TIME, "--rate", "1", "--costs", str(costs)) == 0
    assert "chiasm serve demo --layout" in capsys.readouterr().out


def test_the_costs_of_this_machine_are_measured_if_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # or measuring would set it for this whole process
    file = tmp_path / "new.json"
    planned("demo", "--devices", "cpu:1", *MIX, *IN_TIME, "--rate", "1", "--costs", str(file))
    measured = json.loads(file.read_text())
    assert measured["cores"] == 1
    rows = [seconds for _, seconds in measured["threads"]["1"]["rows"]]
    assert rows == sorted(rows)
    assert all(seconds > 0 for seconds in rows)
