"""Which instance gets which GPU, and how much of its memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from chiasm.errors import ConfigurationError
from chiasm.launch import RoleConfig, devices
from chiasm.launch.devices import Placement, describe, found_gpus, others_serve, place
from chiasm.launch.gpus import Gpu, NoDriverError
from chiasm.wire import Role

E, PD, P, D, ALL = Role.ENCODER, Role.PD, Role.PREFILL, Role.DECODE, Role.AGGREGATED
EIGHT = tuple("01234567")


def _devices(roles: dict[Role, RoleConfig], found: Sequence[str], heads: int | None = 16) -> list[str]:
    """Each instance's devices, in the order of the roles."""
    return ["".join(placement.devices) for placement in place(roles, found, heads).values()]


@pytest.mark.parametrize(
    ("roles", "dealt"),
    [
        ({E: RoleConfig(devices=("0",)), PD: RoleConfig(devices=("1", "2"))}, ["0", "12"]),
        ({E: RoleConfig(devices=("0",)), PD: RoleConfig(2, devices=("1", "2"))}, ["0", "1", "2"]),
        ({PD: RoleConfig(2, devices=("4", "5", "6", "7"))}, ["45", "67"]),
        ({E: RoleConfig(4, devices=("0", "1")), PD: RoleConfig(devices=("2",))}, ["0", "0", "1", "1", "2"]),
    ],
)
def test_named_devices_are_dealt_evenly(roles: dict[Role, RoleConfig], dealt: list[str]) -> None:
    assert _devices(roles, EIGHT) == dealt


@pytest.mark.parametrize(
    ("counts", "found", "dealt"),
    [
        ({E: 1, PD: 1}, "0", ["0", "0"]),
        ({E: 1, PD: 1}, "01", ["0", "1"]),
        ({E: 1, PD: 1}, "0123", ["0", "12"]),
        ({E: 2, PD: 1}, "01", ["0", "0", "1"]),
        ({E: 2, PD: 2}, "01", ["0", "1", "0", "1"]),
        ({E: 1, PD: 1}, "01234567", ["0", "1234"]),
        ({E: 1, P: 1, D: 1}, "012", ["0", "1", "2"]),
        ({ALL: 2}, "01234567", ["0123", "4567"]),
        ({E: 1, PD: 1}, "", ["", ""]),
    ],
)
def test_without_names_all_devices_are_dealt(counts: dict[Role, int], found: str, dealt: list[str]) -> None:
    assert _devices({role: RoleConfig(count) for role, count in counts.items()}, tuple(found)) == dealt


def test_a_model_is_split_only_by_divisors_of_its_heads() -> None:
    assert _devices({ALL: RoleConfig()}, EIGHT, 28) == ["0123"]
    assert _devices({ALL: RoleConfig()}, EIGHT, 9) == ["0"]
    assert _devices({ALL: RoleConfig()}, EIGHT, None) == ["0"]


def test_roles_without_names_get_the_devices_that_others_leave() -> None:
    roles = {E: RoleConfig(), PD: RoleConfig(devices=("0", "1"))}
    assert _devices(roles, ("0", "1", "2")) == ["2", "01"]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({PD: RoleConfig(2, devices=("0", "1", "2"))}, "3 devices for 2 instances"),
        ({PD: RoleConfig(devices=("0", "0"))}, "names 0 more than once"),
        ({PD: RoleConfig(devices=("9",))}, "GPU 9 cannot be used here; the GPUs are 0, 1"),
        ({E: RoleConfig(), PD: RoleConfig(devices=("0", "1", "2", "3", "4", "5", "6", "7"))}, "0 GPU.s. are left"),
        (
            {P: RoleConfig(5), D: RoleConfig(4)},
            "8 GPU.s. are left for 9 instance.s. .* --prefill-devices, --decode-devices",
        ),
        (
            {E: RoleConfig(devices=("0",), memory_share=0.5), PD: RoleConfig(devices=("0",), memory_share=0.6)},
            "given 110%",
        ),
        ({E: RoleConfig(devices=("0",), memory_share=0.9), PD: RoleConfig(devices=("0",))}, "no memory left for pd"),
    ],
)
def test_devices_that_cannot_be_dealt_are_refused(roles: dict[Role, RoleConfig], message: str) -> None:
    found = ("0", "1") if "the GPUs are 0, 1" in message else EIGHT
    with pytest.raises(ConfigurationError, match=message):
        place(roles, found)


def test_a_share_of_memory_needs_a_gpu() -> None:
    with pytest.raises(ConfigurationError, match="--pd-memory-share is a fraction of a GPU's memory"):
        place({PD: RoleConfig(memory_share=0.5)}, ())


def test_the_engine_may_fill_a_device_of_its_own_unless_a_share_is_given() -> None:
    roles = {E: RoleConfig(devices=("0",)), PD: RoleConfig(devices=("1",), memory_share=0.5)}
    assert place(roles, EIGHT) == {(E, 0): Placement(("0",)), (PD, 0): Placement(("1",), 0.5)}


def test_instances_that_share_a_device_share_its_memory() -> None:
    shared = place({E: RoleConfig(), PD: RoleConfig()}, ("0",))
    assert shared == {(E, 0): Placement(("0",), 0.225, True), (PD, 0): Placement(("0",), 0.675, True)}


def test_a_given_share_leaves_the_rest_to_the_others() -> None:
    shared = place({E: RoleConfig(2, memory_share=0.1), PD: RoleConfig()}, ("0",))
    assert [placement.memory_share for placement in shared.values()] == [0.1, 0.1, 0.7]


def test_an_instance_on_several_devices_gets_the_smallest_share_of_them() -> None:
    roles = {E: RoleConfig(devices=("0",), memory_share=0.2), PD: RoleConfig(devices=("0", "1"))}
    assert place(roles, EIGHT)[PD, 0] == Placement(("0", "1"), 0.7, True)


def test_the_choice_is_described_in_one_line() -> None:
    roles = {E: RoleConfig(devices=("0",)), PD: RoleConfig(devices=("0", "1"))}
    assert describe(place(roles, EIGHT)) == (
        "encoder-0 on GPU 0, 22% of the memory; pd-0 on GPUs 0, 1, 68% of the memory"
    )


def test_a_gpu_can_be_lost_if_each_of_its_roles_is_on_another() -> None:
    two = {E: RoleConfig(2, devices=("0", "1")), PD: RoleConfig(2, devices=("0", "1"))}
    placements = place(two, ("0", "1"))
    assert others_serve(placements, [(PD, 1)])
    assert others_serve(placements, [(E, 1), (PD, 1)])
    assert not others_serve(placements, [(PD, 0), (PD, 1)])
    assert not others_serve(placements, [(E, 0), (PD, 1)])


def test_an_instance_without_another_on_other_gpus_cannot_be_done_without() -> None:
    on_one = place({E: RoleConfig(2, devices=("0",)), PD: RoleConfig(devices=("1",))}, ("0", "1"))
    assert not others_serve(on_one, [(E, 0)])
    assert not others_serve(on_one, [(PD, 0)])
    assert not others_serve(place({PD: RoleConfig(2)}, ()), [(PD, 0)])


def test_the_environment_names_gpus_that_the_driver_describes(monkeypatch: pytest.MonkeyPatch) -> None:
    a10 = Gpu("1", "NVIDIA A10", 23028 << 20, "GPU-bb")
    monkeypatch.setattr(devices, "list_gpus", lambda: (a10,))
    assert found_gpus({}) == (a10,)
    assert [gpu.model for gpu in found_gpus({"CUDA_VISIBLE_DEVICES": "GPU-bb,7"})] == ["NVIDIA A10", ""]


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> tuple[Gpu, ...]:
        raise NoDriverError("there is none")

    monkeypatch.setattr(devices, "list_gpus", refuse)
    assert found_gpus({}) == ()


def test_mig_devices_are_given_out_one_by_one_by_their_uuids() -> None:
    found = ("MIG-a", "MIG-b", "MIG-c", "MIG-d")
    placed = place({E: RoleConfig(), PD: RoleConfig()}, found, attention_heads=16)
    assert [placement.devices for placement in placed.values()] == [("MIG-a",), ("MIG-b",)]


def test_a_gpu_that_is_divided_cannot_be_named_by_its_number() -> None:
    with pytest.raises(ConfigurationError, match="GPU 0 cannot be used here; the GPUs are MIG-a"):
        place({PD: RoleConfig(devices=("0",))}, ("MIG-a",))


def test_the_environment_limits_the_devices() -> None:
    assert [gpu.name for gpu in found_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"})] == ["2", "3"]
    assert found_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert found_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == ()
    assert [gpu.name for gpu in found_gpus({"CUDA_VISIBLE_DEVICES": "GPU-1a2b"})] == ["GPU-1a2b"]
