"""Measured and computed costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.errors import ConfigurationError
from chiasm.plan.costs import (
    MeasuredCosts,
    MeasuredFile,
    StepShape,
    ThreadCosts,
    check_writable,
    interpolate,
    read_costs,
    write_costs,
)
from chiasm.plan.devices import GPUS
from chiasm.plan.roofline import STEP_SECONDS, Roofline
from chiasm.plan.shapes import MODELS, fixed

FILE = MeasuredFile(
    model="demo",
    cpu="some",
    cores=2,
    threads={
        1: ThreadCosts([(1, 0.01), (101, 0.11)], 1e-6, 1e-5, [(100, 0.2)]),
        2: ThreadCosts([(1, 0.006), (101, 0.056)], 1e-6, 1e-5, [(100, 0.1)]),
    },
    prepare=[(100, 0.01), (200, 0.02)],
    embedding_seconds_per_token=1e-5,
    kv_seconds_per_token=1e-4,
    request_seconds=0.003,
    busy_factor=1.2,
)
COSTS = MeasuredCosts(FILE, fixed(100))


@pytest.mark.parametrize(("at", "value"), [(0, 1.0), (1, 1.0), (2, 2.0), (3, 3.0), (5, 5.0), (9, 9.0)])
def test_values_lie_on_the_line_through_the_points(at: float, value: float) -> None:
    assert interpolate([(1, 1.0), (3, 3.0), (4, 4.0)], at) == pytest.approx(value)


def test_a_step_costs_its_rows_and_its_attention() -> None:
    step = StepShape(51, prefill_pairs=1000, decode_keys=100)
    assert COSTS.step_seconds(step, 1) == pytest.approx(0.06 + 0.001 + 0.001)


def test_threads_that_were_not_measured_cost_what_fewer_do() -> None:
    assert COSTS.encode_seconds(1, 1, 3) == COSTS.encode_seconds(1, 1, 2) < COSTS.encode_seconds(1, 1, 1)


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_costs(tmp_path / "new" / "costs.json", FILE)
    assert read_costs(tmp_path / "new" / "costs.json", "demo") == FILE


def test_costs_of_another_model_are_refused(tmp_path: Path) -> None:
    write_costs(tmp_path / "costs.json", FILE)
    with pytest.raises(ConfigurationError, match="is of demo, not of other"):
        read_costs(tmp_path / "costs.json", "other")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 1}'])
def test_a_file_with_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(ConfigurationError, match="--calibrate"):
        read_costs(tmp_path / "costs.json", "demo")


def test_a_lone_decode_takes_as_long_as_reading_the_weights() -> None:
    shape, gpu = MODELS["qwen2.5-vl-7b-instruct"], GPUS["h100"]
    seconds = Roofline(gpu, shape).step_seconds(StepShape(1, 0, 100), 1) - STEP_SECONDS
    assert seconds == pytest.approx(shape.language_bytes / gpu.memory_bytes_per_second, rel=0.5)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_more_work_never_takes_less_time(gpu: object, shape: object) -> None:
    costs = Roofline(gpu, shape)  # type: ignore[arg-type]
    steps = [costs.step_seconds(StepShape(rows, rows**2 / 2, rows * 100), 1) for rows in (1, 16, 256, 2048)]
    images = [costs.encode_seconds(side, side, 1) for side in (224, 448, 896, 1792)]
    assert steps == sorted(steps)
    assert images == sorted(images)


def test_a_faster_gpu_takes_less_time() -> None:
    shape = MODELS["qwen3-vl-8b-instruct"]
    seconds = [Roofline(GPUS[name], shape).step_seconds(StepShape(2048), 1) for name in ("b200", "h100", "a100", "l4")]
    assert seconds == sorted(seconds)


def test_a_folder_is_no_file_for_costs(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Is a directory\. Name another file with --costs"):
        check_writable(tmp_path)
