"""Which instances a layout puts where, on machines with CPUs and with invented GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chiasm import cores
from chiasm.errors import ConfigurationError
from chiasm.launch import DeploymentConfig, EngineKind, Layout, RoleConfig, arrangement, config, vllm
from chiasm.launch.arrangement import Arrangement, arrange
from chiasm.launch.gpus import Gpu
from chiasm.launch.layout import cpu_copies
from chiasm.wire import Role

E, PD, P, D, ALL = Role.ENCODER, Role.PD, Role.PREFILL, Role.DECODE, Role.AGGREGATED
GIB = 1 << 30
A10, H100 = ("NVIDIA A10", 24 * GIB), ("NVIDIA H100", 80 * GIB)
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes this a machine with so many cores and these GPUs."""

    def make(usable: int = 2, *kinds: tuple[str, int]) -> None:
        gpus = tuple(Gpu(str(n), *kind, f"GPU-{n}") for n, kind in enumerate(kinds))
        monkeypatch.setattr(cores, "allowed_cpus", lambda: set(range(usable)))
        for module in (arrangement, config):
            monkeypatch.setattr(module, "usable_cores", lambda: usable)
        monkeypatch.setattr(arrangement, "found_gpus", lambda: gpus)
        monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.0" if kinds else "2.9.0+cpu")

    make()
    return make


def _arranged(roles: dict[Role, int] | None = None, **asked: Any) -> Arrangement:
    counted = {role: RoleConfig(count) for role, count in (roles or {}).items()}
    return arrange(DeploymentConfig("demo", counted, **asked), None)


def _where(arranged: Arrangement) -> list[str]:
    return [f"{role}-{index} {','.join(placement.devices)}" for (role, index), placement in arranged.placements.items()]


@pytest.mark.parametrize(
    ("layout", "role", "option"), [(Layout.AUTO, P, "--prefill-cpus"), (Layout.SPLIT, ALL, "--aggregated-cpus")]
)
def test_options_of_a_role_that_the_layout_leaves_out_are_refused(layout: Layout, role: Role, option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option}: there are no {role} instances here"):
        arrange(DeploymentConfig("demo", {role: RoleConfig(None, cpus=(0,))}, layout=layout), None)


def test_options_about_embeddings_and_kv_are_refused_where_none_move() -> None:
    with pytest.raises(ConfigurationError, match="--ec-max-bytes: no embeddings go from instance to instance"):
        arrange(DeploymentConfig("demo", layout=Layout.AGGREGATED, ec_max_bytes=1 << 30), None)
    with pytest.raises(ConfigurationError, match="--kv-connector: only prefill and decode instances exchange KV"):
        arrange(DeploymentConfig("demo", kv_connector="TcpConnector"), None)


# ---- on a CPU ----------------------------------------------------------------------------------------------------------


def test_without_options_encoders_and_pds_share_all_cores(machine: Machine) -> None:
    machine(4)
    arranged = _arranged()
    assert arranged.layout is Layout.COLOCATED
    assert arranged.description == "colocated: 2 encoders and 2 PDs share 4 cores (there is one device)"
    assert list(arranged.placements) == [(E, 0), (E, 1), (PD, 0), (PD, 1)]
    assert {(one.threads, one.cpus, one.core_share) for one in arranged.placements.values()} == {(4, (), "cores-0")}
    assert [one.nice for one in arranged.placements.values()] == [5, 5, 0, 0]


def test_one_core_has_an_encoder_and_a_pd_with_a_thread_each(machine: Machine) -> None:
    machine(1)
    arranged = _arranged()
    assert arranged.description == "colocated: 1 encoder and 1 PD share 1 core (there is one device)"
    assert [one.threads for one in arranged.placements.values()] == [1, 1]


@pytest.mark.parametrize(
    ("usable", "memory_bytes", "copies"), [(1, 64 * GIB, 1), (2, 64 * GIB, 2), (64, 1 << 40, 2), (64, 20 * GIB, 1)]
)
def test_a_cpu_gets_as_many_copies_as_its_cores_and_its_memory_hold(
    usable: int, memory_bytes: int, copies: int
) -> None:
    assert cpu_copies(usable, memory_bytes, 14 * GIB) == copies


@pytest.mark.usefixtures("machine")
def test_counts_are_honoured_on_the_shared_device() -> None:
    arranged = _arranged({E: 2, PD: 1}, layout=Layout.COLOCATED)
    assert list(arranged.placements) == [(E, 0), (E, 1), (PD, 0)]
    assert {one.threads for one in arranged.placements.values()} == {2}


@pytest.mark.usefixtures("machine")
def test_prefill_and_decode_stand_beside_encoders() -> None:
    arranged = _arranged({E: 1, P: 1, D: 1}, layout=Layout.COLOCATED)
    assert "1 encoder, 1 prefill instance and 1 decode instance share 2 cores" in arranged.description
    assert [one.nice for one in arranged.placements.values()] == [5, 0, 0]


def test_sets_of_cores_are_devices_of_their_own(machine: Machine) -> None:
    machine(8)
    arranged = _arranged({E: 1, PD: 1}, layout=Layout.COLOCATED, devices="0-3/4-7")
    assert [(one.cpus, one.threads, one.core_share) for one in arranged.placements.values()] == [
        ((0, 1, 2, 3), 4, "cores-0"),
        ((4, 5, 6, 7), 4, "cores-1"),
    ] * 2
    assert arranged.config.count(E) == 2
    assert "on each of cores 0-3, cores 4-7: 1 encoder and 1 PD, which share it" in arranged.description


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-3/9", r"--devices 0-3/9: CPU 9 cannot be used here"),
        ("0-2/2-3", "CPU 2 is in more than one set"),
        ("0/", "'' is not a set of CPUs"),
        ("GPU-1", "'GPU-1' is not a set of CPUs"),
    ],
)
def test_wrong_sets_of_cores_are_refused(machine: Machine, text: str, message: str) -> None:
    machine(4)
    with pytest.raises(ConfigurationError, match=message):
        _arranged(devices=text)


@pytest.mark.usefixtures("machine")
def test_an_aggregated_instance_has_all_cores_and_several_share_them() -> None:
    (alone,) = _arranged({ALL: 1}, layout=Layout.AGGREGATED).placements.values()
    assert (alone.threads, alone.core_share, alone.nice) == (2, "", 0)
    several = _arranged(layout=Layout.AGGREGATED)
    assert {(one.threads, one.core_share) for one in several.placements.values()} == {(2, "cores-0")}
    assert several.description.startswith("aggregated: 2 aggregated instances share 2 cores")


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("roles", "asked"), [({E: 1, PD: 1}, {}), ({}, {"layout": Layout.SPLIT}), ({ALL: 2}, {})])
def test_roles_that_are_counted_or_split_divide_the_cores(roles: dict[Role, int], asked: dict[str, Any]) -> None:
    arranged = _arranged(roles, **asked)
    assert arranged.layout is Layout.SPLIT
    assert [(one.threads, one.core_share, one.nice) for one in arranged.placements.values()] == [(1, "", 0)] * 2
    assert arranged.description.startswith("aggregated: 2 " if ALL in roles else "split: 1 ")


@pytest.mark.usefixtures("machine")
def test_roles_with_cpus_of_their_own_split() -> None:
    roles = {E: RoleConfig(None, cpus=(0,)), PD: RoleConfig(None, cpus=(1,))}
    arranged = arrange(DeploymentConfig("demo", roles), None)
    assert arranged.layout is Layout.SPLIT
    assert [one.cpus for one in arranged.placements.values()] == [(0,), (1,)]


@pytest.mark.usefixtures("machine")
def test_options_of_roles_are_kept_by_the_layout() -> None:
    roles = {role: RoleConfig(None, threads=1, settings={"max_num_seqs": 3}) for role in (E, PD)}
    arranged = arrange(DeploymentConfig("demo", roles), None)
    assert {one.threads for one in arranged.placements.values()} == {1}
    assert arranged.config.roles == {role: RoleConfig(2, 1, settings={"max_num_seqs": 3}) for role in (E, PD)}


@pytest.mark.usefixtures("machine")
def test_weights_of_16_bits_take_twice_their_size_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    (tmp_path / "model.safetensors").write_bytes(bytes(10))
    in_half = DeploymentConfig("demo", settings={"dtype": "bfloat16"})
    assert arrangement.weights_bytes(DeploymentConfig("demo"), tmp_path, in_float32=True) == 20
    assert arrangement.weights_bytes(DeploymentConfig("demo"), tmp_path, in_float32=False) == 10
    assert arrangement.weights_bytes(in_half, tmp_path, in_float32=True) == 10


def test_weights_that_are_missing_are_left_to_what_loads_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-1.safetensors").write_bytes(bytes(10))
    (tmp_path / "model-2.safetensors").symlink_to(tmp_path / "gone")  # as in the cache of the hub
    assert arrangement.weights_bytes(DeploymentConfig("demo"), tmp_path, in_float32=False) == 10


def test_over_vllm_an_encoder_and_a_pd_may_each_use_all_cores(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(4)
    monkeypatch.setattr(vllm, "installed", lambda: vllm.Installed(Path("/env/bin/vllm"), "0.32.0+cpu"))
    arranged = _arranged(engine=EngineKind.VLLM)
    assert list(arranged.placements) == [(E, 0), (PD, 0)]
    assert [(one.threads, one.core_share, one.nice) for one in arranged.placements.values()] == [(4, "", 5), (4, "", 0)]
    (alone,) = _arranged(engine=EngineKind.VLLM, layout=Layout.AGGREGATED).placements.values()
    assert (alone.threads, alone.core_share, alone.nice) == (4, "", 0)


# ---- on GPUs -----------------------------------------------------------------------------------------------------------


def test_gpus_that_are_alike_have_an_encoder_and_a_pd_each(machine: Machine) -> None:
    machine(8, H100, H100)
    arranged = _arranged()
    assert _where(arranged) == ["encoder-0 0", "encoder-1 1", "pd-0 0", "pd-1 1"]
    assert arranged.description == (
        "colocated: on each of GPU 0, GPU 1: 1 encoder and 1 PD, which share it (the devices are alike)"
    )
    assert arranged.placements[PD, 1].uuids == ("GPU-1",)
    assert [one.memory_share for one in arranged.placements.values()] == [0.225, 0.225, 0.675, 0.675]
    assert {one.core_share for one in arranged.placements.values()} == {""}


def test_gpus_that_differ_are_split_and_the_encoder_gets_the_smaller(machine: Machine) -> None:
    machine(8, H100, A10)
    arranged = _arranged()
    assert _where(arranged) == ["encoder-0 1", "pd-0 0"]
    assert "the GPUs differ: NVIDIA H100, 80 GiB; NVIDIA A10, 24 GiB" in arranged.description


def test_named_gpus_are_the_only_ones(machine: Machine) -> None:
    machine(8, H100, A10, H100)
    assert _where(_arranged(devices="0,2")) == ["encoder-0 0", "encoder-1 2", "pd-0 0", "pd-1 2"]
    assert _where(_arranged(layout=Layout.SPLIT, devices="GPU-1,2")) == ["encoder-0 GPU-1", "pd-0 2"]
    assert _where(_arranged(layout=Layout.AGGREGATED, devices="1")) == ["aggregated-0 1"]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("0,7", "--devices: GPU 7 cannot be used here; the GPUs are 0, 1"),
        ("0,0", "--devices names 0 more than once"),
        ("0,GPU-0", "--devices names 0 more than once"),
        ("GPU-9", "--devices: GPU-9 cannot be used here"),
        ("0/1", "is not a list of GPUs"),
        ("0,,1", "is not a list of GPUs"),
    ],
)
def test_wrong_gpus_are_refused(machine: Machine, devices: str, message: str) -> None:
    machine(8, H100, H100)
    with pytest.raises(ConfigurationError, match=message):
        _arranged(devices=devices)


def test_with_device_cpu_gpus_are_left_alone(machine: Machine) -> None:
    machine(4, H100)
    arranged = _arranged(settings={"device": "cpu"})
    assert _where(arranged) == ["encoder-0 ", "encoder-1 ", "pd-0 ", "pd-1 "]


def test_a_gpu_that_the_option_device_names_is_shared(machine: Machine) -> None:
    machine(4, H100, H100)
    arranged = _arranged(settings={"device": "cuda:1"})
    assert arranged.description == "colocated: 1 encoder and 1 PD share cuda:1 (there is one device)"
    with pytest.raises(ConfigurationError, match="--device and --devices both name GPUs"):
        _arranged(settings={"device": "cuda:1"}, devices="0")


def test_a_model_too_large_for_a_part_of_a_gpu_is_split(machine: Machine, tmp_path: Path) -> None:
    machine(8, ("small", 10), ("small", 10))
    (tmp_path / "model.safetensors").write_bytes(bytes(9))
    arranged = arrange(DeploymentConfig("demo"), tmp_path)
    assert arranged.layout is Layout.SPLIT
    assert "too large" in arranged.description


# ---- contradictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "roles", "message"),
    [
        (Layout.AGGREGATED, {PD: RoleConfig()}, "aggregated instances only, but pd instances are asked for"),
        (Layout.COLOCATED, {ALL: RoleConfig()}, "leave out --aggregated, or choose --layout aggregated"),
        (Layout.COLOCATED, {PD: RoleConfig()}, "at least one of each"),
        (Layout.COLOCATED, {PD: RoleConfig(None, devices=("0",))}, "--pd-devices contradicts it"),
        (Layout.AGGREGATED, {ALL: RoleConfig(None, cpus=(0,))}, "--aggregated-cpus contradicts it"),
    ],
)
def test_a_layout_and_roles_that_contradict_it_are_refused(
    layout: Layout, roles: dict[Role, RoleConfig], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DeploymentConfig("demo", roles, layout=layout)


def test_devices_of_all_and_of_a_role_contradict_each_other() -> None:
    with pytest.raises(ConfigurationError, match="--devices is for all instances and --pd-cpus for some"):
        DeploymentConfig("demo", {PD: RoleConfig(None, cpus=(0,))}, devices="0-1")


@pytest.mark.usefixtures("machine")
def test_roles_do_not_divide_sets_of_cores() -> None:
    with pytest.raises(ConfigurationError, match=r"choose --layout colocated or aggregated, or pin the roles"):
        _arranged({E: 1, PD: 1}, devices="0/1")


# ---- encoders that come and go ------------------------------------------------------------------------------------------


def _ranged(least: int, most: int, others: dict[Role, RoleConfig] | None = None, **asked: Any) -> Arrangement:
    roles = {E: RoleConfig(most, least=least), **(others or {PD: RoleConfig()})}
    return arrange(DeploymentConfig("demo", roles, **asked), None)


@pytest.mark.usefixtures("machine")
def test_encoders_beyond_the_fewest_are_spare() -> None:
    arranged = _ranged(2, 4)
    assert arranged.description.startswith("split: 2 to 4 encoders and 1 PD (")
    assert [index for index in range(4) if arranged.is_spare(E, index)] == [2, 3]
    assert not arranged.is_spare(PD, 0)
    assert not any(_arranged({E: 4, PD: 1}).is_spare(E, index) for index in range(4))


def test_a_range_counts_for_each_device_and_devices_take_turns(machine: Machine) -> None:
    machine(4)
    arranged = _ranged(1, 3, layout=Layout.COLOCATED, devices="0-1/2-3")
    assert arranged.description.startswith("colocated: on each of cores 0-1, cores 2-3: 1 to 3 encoders and 1 PD, ")
    assert (arranged.config.least_encoders, arranged.config.count(E)) == (2, 6)
    assert arranged.encoders == [0, 3, 1, 4, 2, 5]
    assert [arranged.is_spare(E, index) for index in range(6)] == [False, True, True, False, True, True]


def test_over_vllm_encoders_may_come_and_go_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(4)
    monkeypatch.setattr(vllm, "installed", lambda: vllm.Installed(Path("/env/bin/vllm"), "0.32.0+cpu"))
    assert _ranged(1, 2, engine=EngineKind.VLLM).encoders == [0, 1]


def test_on_gpus_each_encoder_of_a_range_has_its_own_unless_they_are_told_to_share(machine: Machine) -> None:
    machine(8, H100, H100, H100)
    assert _where(_ranged(1, 2, layout=Layout.SPLIT)) == ["encoder-0 0", "encoder-1 1", "pd-0 2"]
    with pytest.raises(ConfigurationError, match=r"--encoders 1\.\.3 needs 3 GPUs for encoders"):
        _ranged(1, 3, layout=Layout.SPLIT)
    roles = {E: RoleConfig(3, least=1, devices=("0",)), PD: RoleConfig(devices=("1",))}
    shared = arrange(DeploymentConfig("demo", roles), None)
    assert _where(shared) == ["encoder-0 0", "encoder-1 0", "encoder-2 0", "pd-0 1"]


def test_on_a_gpu_that_encoders_share_the_kv_cache_must_leave_room(machine: Machine) -> None:
    machine(8, H100)
    with pytest.raises(ConfigurationError, match="limit its KV cache with --kv-cache-bytes"):
        _ranged(1, 2, layout=Layout.COLOCATED)
    assert _ranged(1, 2, layout=Layout.COLOCATED, settings={"kv_cache_bytes": 1 << 30}).encoders == [0, 1]


@pytest.mark.parametrize(
    ("role", "chosen", "message"),
    [
        (E, RoleConfig(2, least=0), "There can't be 0 to 2 encoders"),
        (E, RoleConfig(2, least=3), "There can't be 3 to 2 encoders"),
        (PD, RoleConfig(2, least=1), "Only encoders come and go by what is needed, and pd instances don't"),
    ],
)
def test_a_least_number_that_cannot_be_is_refused(role: Role, chosen: RoleConfig, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DeploymentConfig("demo", {E: RoleConfig(), PD: RoleConfig(), role: chosen})
