"""Which layouts are tried, and which don't fit."""

from __future__ import annotations

import pytest

from chiasm.cli import serve
from chiasm.cores import allowed_cpus
from chiasm.errors import ConfigurationError
from chiasm.launch.arrangement import arrange
from chiasm.launch.layout import Layout
from chiasm.plan.devices import Cpu, parse_devices
from chiasm.plan.layouts import Candidate, candidates, fitting, split_on_cpu
from chiasm.plan.shapes import MODELS
from chiasm.wire import Role

SMALL, LARGE = MODELS["qwen3-vl-2b-instruct"], MODELS["qwen2.5-vl-7b-instruct"]


def of(text: str, layout: Layout) -> list[Candidate]:
    return [one for one in candidates(parse_devices(text)) if one.layout is layout]


@pytest.mark.parametrize("text", ["1xH100", "2xH100", "8xH100", "64xL4", "2xL4,1xH100"])
def test_every_candidate_uses_every_device(text: str) -> None:
    devices = parse_devices(text)
    for one in candidates(devices):
        assert {instance.place for instance in one.instances} == set(range(len(devices))), one.name


def test_a_single_gpu_is_not_divided() -> None:
    assert {one.layout for one in candidates(parse_devices("1xH100"))} == {Layout.AGGREGATED, Layout.COLOCATED}


def test_all_divisions_of_a_few_gpus_are_tried() -> None:
    found = {tuple(one.counts.items()) for one in of("4xH100", Layout.SPLIT)}
    whole = {((Role.ENCODER, count), (Role.PD, 4 - count)) for count in (1, 2, 3)}
    parts = {((Role.ENCODER, e), (Role.PREFILL, p), (Role.DECODE, 4 - e - p)) for e, p in ((1, 1), (1, 2), (2, 1))}
    assert found == whole | parts


def test_many_gpus_are_divided_coarsely() -> None:
    assert len(candidates(parse_devices("64xH100"))) == len(candidates(parse_devices("8xH100")))


def test_encoders_get_the_weakest_gpus() -> None:
    for one in of("1xH100,1xL4", Layout.SPLIT):
        (encoder,) = (instance for instance in one.instances if instance.role is Role.ENCODER)
        assert one.places[encoder.place].device.name == "L4"
        assert "--encoder-devices 1" in one.options


@pytest.mark.parametrize("text", ["cpu", "1xH100", "4xH100", "1xL4,2xH100"])
def test_serve_takes_the_options_of_every_candidate(text: str) -> None:
    for one in candidates(parse_devices(text)):
        config = serve.deployment_config(serve.parser().parse(["demo", *one.options.split()]))
        if config.is_counted:
            counts = {role: config.count(role) for role in config.roles}
            assert counts == one.counts, one.options


@pytest.mark.skipif(len(allowed_cpus()) < 2, reason="this machine has one core")
@pytest.mark.parametrize("count", [1, 2])
def test_serve_runs_on_as_many_cores_as_were_planned_for(count: int) -> None:
    cpus = tuple(sorted(allowed_cpus())[:count])
    for one in candidates([Cpu(count, cpus)]):
        config = serve.deployment_config(serve.parser().parse(["demo", *one.options.split(), "--device", "cpu"]))
        placements = arrange(config, None).placements.values()
        assert {cpu for placement in placements for cpu in placement.cpus} == set(cpus), one.options
        assert all(placement.cpus and (placement.threads or 0) <= len(placement.cpus) for placement in placements)


def test_roles_that_divide_some_of_the_cores_are_pinned_to_their_own() -> None:
    options = split_on_cpu(Cpu(7, (0, 1, 2, 4, 5, 6, 7)), 1, 2).options
    assert options == "--layout split --encoders 1 --pds 2 --encoder-cpus 0-1 --pd-cpus 2,4-7"


def test_a_single_core_is_shared() -> None:
    assert {one.layout for one in candidates([Cpu(1)])} == {Layout.AGGREGATED, Layout.COLOCATED}


def test_two_cores_are_shared_or_divided() -> None:
    assert [one.name for one in candidates([Cpu(2)])] == [
        "aggregated: 1 aggregated instance",
        "aggregated: 2 aggregated instances",
        "colocated: 1 encoder and 1 PD",
        "colocated: 2 encoders and 2 PDs",
        "split: 1 encoder and 1 PD",
    ]


def test_what_does_not_fit_is_left_out_with_the_reason() -> None:
    left_out: list[str] = []
    tried = fitting(
        candidates(parse_devices("1xL4,1xH100")),
        LARGE,
        60_000,
        lambda one, reason: left_out.append(f"{one.layout} {reason}"),
    )
    assert {one.layout for one in tried} == {Layout.SPLIT}
    assert left_out
    assert all("of L4" in reason or "L4 has" in reason for reason in left_out)


def test_a_model_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="does not fit these devices"):
        fitting(candidates(parse_devices("2xL4")), LARGE, 120_000, lambda one, reason: None)


def test_a_small_model_fits_everywhere() -> None:
    tried = candidates(parse_devices("3xL4"))
    assert fitting(tried, SMALL, 4000, lambda one, reason: None) == tried
