"""What a person writes for devices."""

from __future__ import annotations

import pytest

from chiasm.cores import allowed_cpus, usable_cores
from chiasm.errors import ConfigurationError
from chiasm.plan.devices import Cpu, parse_devices


def names(text: str) -> list[str]:
    return [device.name for device in parse_devices(text)]


def test_a_count_and_a_name_are_so_many_gpus() -> None:
    assert names("3xH100") == ["H100"] * 3


def test_groups_keep_their_order() -> None:
    assert names("2xL4, 1xH100") == ["L4", "L4", "H100"]


@pytest.mark.parametrize("text", ["RTX 4090", "rtx-4090", "1x4090", "1*RTX4090"])
def test_a_gpu_has_several_spellings(text: str) -> None:
    assert names(text) == ["RTX4090"]


def test_cpu_means_all_usable_cores() -> None:
    assert parse_devices("cpu") == (Cpu(usable_cores()),)


def test_cpu_can_be_fewer_cores() -> None:
    (one,) = parse_devices("cpu:1")
    assert isinstance(one, Cpu)
    assert one.cores == 1
    assert one.cpus == (() if usable_cores() == 1 else (min(allowed_cpus()),))


def test_all_cores_by_number_are_all_cores() -> None:
    assert parse_devices(f"cpu:{usable_cores()}") == parse_devices("cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not understood"),
        ("8x", "no figures"),
        ("?", "not understood"),
        ("2xH100,", "not understood"),
        ("0xH100", "1 to 64"),
        ("999xH100", "1 to 64"),
        ("40xH100,40xL4", "at most 64"),
        ("2xTPU", "no figures for 'TPU'"),
        ("-2xH100", "no figures|not understood"),
        ("cpu:0", "usable cores"),
        ("cpu:100000", "usable cores"),
        ("cpu:1,2xH100", "GPUs or for this machine's cores"),
    ],
)
def test_nonsense_is_refused_with_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_devices(text)
