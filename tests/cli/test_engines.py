"""What options of `chiasm serve` become for each engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chiasm.cli.engines import flags_of
from chiasm.cli.options import (
    ArgumentOptions,
    DeploymentOptions,
    DeviceOptions,
    ECOptions,
    EngineOptions,
    KVOptions,
    MediaOptions,
)
from chiasm.cli.serve import configured
from chiasm.cli.values import Names
from chiasm.errors import ConfigurationError
from chiasm.launch.config import EngineKind
from chiasm.wire import Role
from tests.cli.running import run

NO_MEDIA, NO_ARGUMENTS = MediaOptions(), ArgumentOptions()


def _pairs(flags: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(flags[::2], flags[1::2], strict=True))


def test_the_built_in_engine_gets_options_as_they_were_given() -> None:
    options = EngineOptions(dtype="bfloat16", max_items=3)
    arguments = ArgumentOptions(pd_args=Names(("--block-size", "32")))
    flags = flags_of(EngineKind.CHIASM, options, MediaOptions(max_image_pixels=9), arguments, "info")
    assert _pairs(flags.of_all) == {
        "--dtype": "bfloat16",
        "--max-items": "3",
        "--max-image-pixels": "9",
        "--log-level": "info",
    }
    assert flags.of_role(Role.PD) == ("--block-size", "32")
    assert flags.of_role(Role.ENCODER) == ()


def test_the_built_in_engine_refuses_what_is_for_vllm() -> None:
    with pytest.raises(ConfigurationError, match="--vllm-args are for --engine vllm"):
        flags_of(
            EngineKind.CHIASM, EngineOptions(), NO_MEDIA, ArgumentOptions(vllm_args=Names(("--seed", "1"))), "info"
        )


def test_vllm_gets_its_own_names_for_what_it_knows() -> None:
    options = EngineOptions(
        dtype="float16",
        device="auto",
        max_model_len=4096,
        max_num_batched_tokens=1024,
        max_num_seqs=9,
        max_queued_requests=7,
        block_size=32,
    )
    assert _pairs(flags_of(EngineKind.VLLM, options, NO_MEDIA, NO_ARGUMENTS, "Warning").of_all) == {
        "--log-level": "WARNING",
        "--uvicorn-log-level": "warning",
        "--dtype": "float16",
        "--max-model-len": "4096",
        "--max-num-batched-tokens": "1024",
        "--max-num-seqs": "9",
        "--max-num-queued-reqs": "7",
        "--block-size": "32",
    }


def test_images_are_counted_where_they_are_seen_and_kv_where_it_lies() -> None:
    flags = flags_of(
        EngineKind.VLLM, EngineOptions(max_items=3, kv_cache_bytes=1 << 30), NO_MEDIA, NO_ARGUMENTS, "info"
    )
    of_roles = {role: _pairs(flags.of_role(role)) for role in Role}
    seeing = {role for role, given in of_roles.items() if "--limit-mm-per-prompt" in given}
    assert seeing == {Role.ENCODER, Role.AGGREGATED}
    assert json.loads(of_roles[Role.ENCODER]["--limit-mm-per-prompt"]) == {"image": 3}
    holding = {role for role, given in of_roles.items() if given.get("--kv-cache-memory-bytes") == str(1 << 30)}
    assert holding == set(Role) - {Role.ENCODER}


def test_media_are_the_proxys_with_vllm(tmp_path: Path) -> None:
    flags = flags_of(
        EngineKind.VLLM, EngineOptions(), MediaOptions(allowed_local_media_path=tmp_path), NO_ARGUMENTS, "info"
    )
    assert str(tmp_path) not in flags.of_all


def test_arguments_for_all_come_before_those_for_a_role() -> None:
    arguments = ArgumentOptions(vllm_args=Names(("--seed", "1")), pd_args=Names(("--seed", "2")))
    flags = flags_of(EngineKind.VLLM, EngineOptions(), NO_MEDIA, arguments, "info")
    assert flags.of_role(Role.PD) == ("--seed", "1", "--seed", "2")
    assert flags.of_role(Role.ENCODER) == ("--seed", "1")


def test_arguments_for_the_proxy_come_last_there() -> None:
    config = configured(
        "demo",
        DeploymentOptions(),
        EngineOptions(max_items=3),
        DeviceOptions(pd_devices=Names(("1",))),
        ArgumentOptions(proxy_args=Names(("--max-items", "2"))),
        ECOptions(),
        KVOptions(),
        NO_MEDIA,
    )
    assert config.proxy_flags[-4:] == ("--max-items", "3", "--max-items", "2")
    assert config.roles[Role.PD].devices == ("1",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions(device="cuda:1"), "--device means nothing to vLLM: .*--encoder-devices"),
        (
            EngineOptions(encoder_cache_bytes=1),
            "--encoder-cache-bytes means nothing to vLLM: .*--max-num-batched-tokens",
        ),
    ],
)
def test_what_means_nothing_to_vllm_is_refused(options: EngineOptions, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        flags_of(EngineKind.VLLM, options, NO_MEDIA, NO_ARGUMENTS, "info")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vllm-args", "--seed 1"], "--vllm-args are for --engine vllm"),
        (["--pd-memory-share", "0.5"], "--pd-memory-share is vLLM's"),
        (["--pd-args", "'unclosed"], "is not a command line"),
        (["--pd-devices", "0,,1"], "is not a list of devices"),
        (["--pd-devices", "a", "--pd-args", "--x"], "the built-in engine takes numbers, not 'a'"),
        (["--engine", "vllm", "--device", "cpu"], "--device means nothing to vLLM"),
        (["--engine", "vllm", "--kv-connector", "SharedMemoryConnector"], "--kv-connector: vLLM instances"),
    ],
)
def test_a_command_that_cannot_be_followed_ends_at_once(arguments: list[str], message: str) -> None:
    done = run("serve", "demo", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
