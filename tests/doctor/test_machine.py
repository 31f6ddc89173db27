"""What this machine has, compared with what a plan needs."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest

from chiasm.cores import usable_cores
from chiasm.doctor import machine
from chiasm.doctor.machine import Need, Tenant
from chiasm.launch.gpus import Gpu
from tests.doctor.results import problem, verdicts, warning

GIB = 1 << 30
H100 = Gpu("0", "NVIDIA H100", 80 * GIB, free_bytes=79 * GIB, capability=9.0)
V100 = Gpu("1", "Tesla V100", 16 * GIB, free_bytes=15 * GIB, capability=7.0)


def test_more_threads_than_cores_are_warned_about() -> None:
    cores = usable_cores()
    assert verdicts(machine.cores([1] * cores)) == ["ok"]
    found = warning(machine.cores([cores, 1]))
    assert f"{cores + 1} threads of 2 instances" in found.says
    assert verdicts(machine.cores()) == ["ok"]


def test_weights_larger_than_the_memory_are_a_problem() -> None:
    assert "20.0 GiB for weights" in problem(machine.memory(8 * GIB, Need(20 * GIB, GIB))).says


def test_an_upper_bound_of_weights_is_only_warned_about() -> None:
    assert "up to 20.0 GiB" in warning(machine.memory(8 * GIB, Need(20 * GIB, GIB, is_upper_bound=True))).says


def test_caches_larger_than_the_rest_of_the_memory_are_warned_about() -> None:
    assert "3.0 GiB for caches" in warning(machine.memory(8 * GIB, Need(6 * GIB, 3 * GIB))).says
    assert verdicts(machine.memory(8 * GIB, Need(4 * GIB, 3 * GIB))) == ["ok"]


def test_missing_shared_memory_is_skipped(tmp_path: Path) -> None:
    assert verdicts(machine.shared_memory(tmp_path / "none")) == ["skipped"]


def test_little_shared_memory_matters_only_to_a_plan_that_uses_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "LEAST_BYTES", 1 << 62)
    assert "free in" in warning(machine.shared_memory(tmp_path)).says
    assert verdicts(machine.shared_memory(tmp_path, is_planned=False)) == ["skipped"]


@pytest.mark.parametrize(("limit", "verdict"), [(1024, "warning"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_a_low_limit_of_open_files_is_warned_about(limit: int, verdict: str) -> None:
    assert verdicts(machine.open_files(limit)) == [verdict]


def test_a_gpu_that_vllm_does_not_support_is_warned_about() -> None:
    assert "compute capability 7.0" in warning(machine.gpus([H100, V100], for_vllm=True)).says
    assert verdicts(machine.gpus([H100, V100], for_vllm=False)) == ["ok"]


def test_a_gpu_that_other_processes_use_is_warned_about() -> None:
    busy = Gpu("0", "NVIDIA H100", 80 * GIB, free_bytes=10 * GIB, capability=9.0)
    assert "10.0 GiB free of 80.0 GiB" in warning(machine.gpus([busy], for_vllm=True)).says


def test_a_torch_without_cuda_beside_a_gpu_is_warned_about() -> None:
    assert "build for CPUs" in warning(machine.gpus([H100], for_vllm=False, torch_version="2.13.0+cpu")).says


def test_weights_larger_than_their_gpu_are_a_problem() -> None:
    tenants = [Tenant("encoder-0", ("0",), GIB), Tenant("pd-0", ("1",), 20 * GIB)]
    assert "pd-0 needs 20.0 GiB" in problem(machine.gpu_memory([H100, V100], tenants)).says


def test_weights_larger_than_their_share_of_a_gpu_are_a_problem() -> None:
    tenant = Tenant("pd-0", ("0",), 20 * GIB, memory_share=0.1)
    assert "has 8.0 GiB" in problem(machine.gpu_memory([H100], [tenant])).says
    assert verdicts(machine.gpu_memory([H100], [Tenant("pd-0", ("0",), 20 * GIB, memory_share=0.5)])) == ["ok"]


def test_an_unlisted_gpu_is_skipped() -> None:
    assert verdicts(machine.gpu_memory([H100], [Tenant("pd-0", ("GPU-1a2b",), 1)])) == ["skipped"]


def test_a_port_in_use_is_a_problem() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        found = problem(machine.port("127.0.0.1", number))
    assert f"Port {number}" in found.says
    assert str(number) in found.command


def test_a_free_port_is_ok() -> None:
    assert verdicts(machine.port("127.0.0.1", 0)) == ["ok"]


def test_threads_of_instances_that_share_cores_are_not_added_up() -> None:
    usable = usable_cores()
    (found,) = machine.cores([usable, usable], are_shared=True)
    assert (found.verdict, f"shared by 2 instances of up to {usable} threads" in found.says) == ("ok", True)
    warning(machine.cores([usable + 1], are_shared=True))
