"""Options are the configurations' fields, and --help shows the configurations' defaults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chiasm.bench.goodput_options import GoodputOptions
from chiasm.bench.soak_options import SoakOptions
from chiasm.cli import doctor, drain, instance, proxy, serve
from chiasm.cli.bench import BenchOptions
from chiasm.cli.demo import DemoConfig
from chiasm.cli.doctor import DoctorConfig
from chiasm.cli.parser import Parser, parse_size
from chiasm.ec_transfer import ECTransferConfig
from chiasm.engine.config import EngineConfig
from chiasm.errors import ConfigurationError
from chiasm.http.config import HttpConfig
from chiasm.kv_transfer import KVTransferConfig
from chiasm.launch.arrangement import arrange
from chiasm.launch.config import DeploymentConfig, EngineKind, RoleConfig
from chiasm.launch.layout import Layout
from chiasm.launch.process import INSTANCE_OPTIONS, InstanceProcess
from chiasm.media import MediaConfig
from chiasm.options import NamedOption, fields_from, options_of
from chiasm.proxy import ProxyConfig
from chiasm.server import ServerConfig
from chiasm.wire import Role

CONFIGURATIONS = (
    EngineConfig,
    ECTransferConfig,
    KVTransferConfig,
    MediaConfig,
    ServerConfig,
    HttpConfig,
    ProxyConfig,
    InstanceProcess,
    DeploymentConfig,
    RoleConfig,
    BenchOptions,
    GoodputOptions,
    SoakOptions,
    DemoConfig,
    DoctorConfig,
)


def _config(*arguments: str) -> DeploymentConfig:
    return serve.deployment_config(serve.parser().parse(["demo", *arguments]))


@pytest.mark.parametrize(
    ("config", "option"),
    [(config, option) for config in CONFIGURATIONS for option in options_of(config)],
    ids=lambda value: getattr(value, "__name__", None) or value.name,
)
def test_a_field_is_an_option_with_its_default_in_help(config: type, option: NamedOption) -> None:
    parser = Parser("x", "", "")
    parser.add("group", config)
    text = " ".join(parser.format_help().split())
    shown = text[text.index(f"{option.flag} ") :]
    assert option.option.help.replace("- ", "-") in shown.replace("- ", "-")  # lines break behind hyphens too
    if option.option.json:
        assert not option.default or f"[default: {json.dumps(option.default)}]" in shown
    elif option.default and option.type is not bool:
        default = shown[shown.index("[default: ") :].removeprefix("[default: ").partition("]")[0]
        read = parse_size if option.name.endswith("_bytes") else option.type
        assert read(default) == option.default


def test_options_that_are_not_given_are_left_to_the_configuration() -> None:
    assert instance.parser().parse(["demo", "--role", "pd"]) == {"model": "demo", "role": Role.PD}


def test_options_set_the_fields_of_their_configurations(tmp_path: Path) -> None:
    arguments = ["demo", "--role", "encoder", "--max-media-bytes", "5K", "--allowed-media-domains", "a"]
    arguments += ["--allowed-media-domains", "b", "--allowed-local-media-path", str(tmp_path), "--ec-max-bytes=7"]
    settings = instance.parser().parse(arguments)
    assert fields_from(settings, MediaConfig) == {
        "max_media_bytes": 5 << 10,
        "allowed_media_domains": ("a", "b"),
        "allowed_local_media_path": tmp_path,
    }
    assert fields_from(settings, ECTransferConfig) == {"max_bytes": 7}


def test_options_have_names_of_their_own() -> None:
    names = [option.name for config in INSTANCE_OPTIONS for option in options_of(config)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ProxyConfig(pds=("http://pd",), probe_interval_seconds=0),
            "--probe-interval-seconds must be positive.",
        ),
        (lambda: ServerConfig(deadline_seconds=-1), "--deadline-seconds must be positive."),
        (lambda: ProxyConfig(shutdown_timeout_seconds=-1), "--shutdown-timeout-seconds must not be negative."),
        (lambda: MediaConfig(max_redirects=-1), "max_redirects must not be negative."),  # not an option
    ],
)
def test_a_number_that_cannot_be_is_refused_by_the_name_of_its_option(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        make()
    assert refusal.value.message == message


def test_the_environment_may_hold_the_admin_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIASM_ADMIN_KEY", "of the environment")
    assert proxy.parser().parse([])["admin_key"] == "of the environment"
    assert proxy.parser().parse(["--admin-key", "given"])["admin_key"] == "given"
    config = _config("--admin-key", "given" * 4, "--proxy-args", "--max-items 2")
    assert (config.admin_key, config.proxy_settings) == ("given" * 4, {"max_items": 2})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, dict.fromkeys(Role)),
        ({"encoders": 3}, {Role.ENCODER: 3, Role.PD: 1}),
        ({"pds": 2}, {Role.ENCODER: 1, Role.PD: 2}),
        ({"encoders": 0, "pds": 1}, {Role.PD: 1}),
        ({"encoders": 0, "pds": 0}, dict.fromkeys(Role, 0)),
        ({"aggregated": 2}, {Role.AGGREGATED: 2}),
        ({"encoders": 1, "pds": 1, "aggregated": 1}, {Role.ENCODER: 1, Role.PD: 1, Role.AGGREGATED: 1}),
        ({"prefills": 1, "decodes": 2}, {Role.ENCODER: 1, Role.PREFILL: 1, Role.DECODE: 2}),
        ({"encoders": 0, "prefills": 1, "decodes": 1}, {Role.PREFILL: 1, Role.DECODE: 1}),
        ({"prefills": 0, "decodes": 0}, {Role.ENCODER: 1, Role.PD: 1}),
    ],
    ids=str,
)
def test_default_instance_counts(given: dict[str, Any], expected: dict[Role, int]) -> None:
    assert serve.instance_counts(given) == expected


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["--aggregated", "1", "--pd-args", "--max-num-seqs 2"], "--pd-args: there are no PD instances here"),
        (["--encoders", "1", "--decode-cpus", "0"], "--decode-cpus: there are no decode instances here"),
        (["--encoders", "0", "--encoder-args", "--max-items 2"], "--encoder-args: there are no encoder instances here"),
        (
            ["--pds", "1", "--kv-lease-seconds", "3"],
            "--kv-lease-seconds: only prefill and decode instances exchange KV",
        ),
        (["--aggregated", "1", "--ec-max-bytes", "1GiB"], "--ec-max-bytes: no embeddings go from instance to instance"),
    ],
)
def test_options_of_instances_that_are_not_there_are_refused(arguments: list[str], refused: str) -> None:
    with pytest.raises(ConfigurationError, match=refused):
        arrange(_config(*arguments), None)


def test_options_of_instances_that_are_not_there_are_read_all_the_same() -> None:
    with pytest.raises(ConfigurationError, match=r"--pd-args: .*--nonsense"):
        _config("--aggregated", "1", "--pd-args", "--nonsense")


def test_encoders_may_be_a_range_from_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("encoders: 1..4\n")
    arguments = ["demo", "--pds", "2"]
    for given, environment in (
        (["--encoders", "1..4"], {}),
        ([], {"CHIASM_ENCODERS": "1..4"}),
        (["--config", str(file)], {}),
    ):
        config = serve.deployment_config(serve.parser().parse([*arguments, *given], environment))
        assert config.scales
        assert (config.least_encoders, config.count(Role.ENCODER), config.count(Role.PD)) == (1, 4, 2)


@pytest.mark.parametrize("arguments", [("--encoders", "2"), ("--encoders", "2..2"), ("--pds", "1"), ()])
def test_their_number_does_not_change_without_a_range(arguments: tuple[str, ...]) -> None:
    config = _config(*arguments)
    assert not config.scales
    assert config.least_encoders == config.count(Role.ENCODER)


def test_a_range_from_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"There can't be 0 to 2 encoders; ask for a range such as 1\.\.4"):
        _config("--encoders", "0..2")


def test_instances_of_the_built_in_engine_get_options_as_they_were_given() -> None:
    config = _config(
        "--dtype", "bfloat16", "--max-items", "3", "--max-image-pixels", "9", "--pd-args", "--block-size 32"
    )
    assert config.settings == {"dtype": "bfloat16", "max_items": 3, "max_image_pixels": 9}
    assert config.roles[Role.PD].settings == {"block_size": 32}
    assert config.roles[Role.ENCODER].settings == {}


def test_only_the_proxy_is_told_where_traces_go() -> None:
    config = _config("--otlp-traces-endpoint", "http://collector:4318")
    assert config.proxy_settings == {"otlp_traces_endpoint": "http://collector:4318"}
    assert config.settings == {}


def test_arguments_for_the_proxy_override_common_options() -> None:
    config = _config("--max-items", "3", "--max-image-pixels", "9", "--proxy-args", "--max-items 2", "--port", "9000")
    assert config.proxy_settings == {"max_items": 2, "max_image_pixels": 9}
    assert config.port == 9000


def test_a_role_has_devices_cpus_and_threads() -> None:
    config = _config("--pd-devices", "1, 2", "--pd-cpus", "0-1", "--threads", "3")
    assert config.roles[Role.PD] == RoleConfig(None, 3, (0, 1), ("1", "2"))


def test_flags_for_every_vllm_instance_are_kept_apart_from_those_for_a_role() -> None:
    config = _config("--engine", "vllm", "--vllm-args", "--seed 1", "--pd-args", "--enforce-eager", "--max-items", "2")
    assert config.engine is EngineKind.VLLM
    assert (config.vllm_flags, config.roles[Role.PD].vllm_flags) == (("--seed", "1"), ("--enforce-eager",))
    assert config.settings == {"max_items": 2}


@pytest.mark.parametrize("arguments", ["--encoder", "--max-ite 3"])
def test_more_arguments_are_checked_by_the_parser_of_their_command(arguments: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--pd-args: Unrecognized arguments: "):
        _config("--pd-args", arguments)


def test_the_doctor_takes_every_option_of_serve() -> None:
    names = {action.dest for action in serve.parser()._actions} - {
        "model",
        "config",
        "dry_run",
    }  # the model is its target
    offered = {action.dest for action in doctor.parser()._actions}
    assert names <= offered
    assert {"dtype", "max_items", "ec_max_bytes", "ec_store"} <= names


def test_a_drain_that_is_not_waited_for_takes_no_time_to_wait() -> None:
    with pytest.raises(ConfigurationError, match="--timeout-seconds is for --wait"):
        drain.run(drain.parser().parse(["http://127.0.0.1:9", "--timeout-seconds", "900"]))


def test_a_shared_cache_is_for_instances_and_proxy() -> None:
    config = _config("--ec-store", "redis://host", "--ec-store-read-bytes", "1GiB", "--ec-store-queue-bytes", "9")
    assert (config.ec_store, config.ec_store_read_bytes, config.ec_store_queue_bytes) == ("redis://host", 1 << 30, 9)


def test_without_counts_the_layout_decides_them_and_roles_keep_their_options() -> None:
    config = _config("--pd-args", "--block-size 32", "--devices", "0-1/2-3")
    assert (config.layout, config.devices, config.is_counted) == (Layout.AUTO, "0-1/2-3", False)
    assert config.roles[Role.PD].settings == {"block_size": 32}


def test_a_layout_takes_counts() -> None:
    config = _config("--layout", "colocated", "--encoders", "2")
    assert (config.layout, config.count(Role.ENCODER), config.count(Role.PD)) == (Layout.COLOCATED, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "aggregated", "--pds", "1"], "--layout aggregated runs aggregated instances only"),
        (["--layout", "colocated", "--aggregated", "1"], "leave out --aggregated"),
        (["--layout", "colocated", "--pd-cpus", "0"], "--pd-cpus contradicts it"),
        (["--layout", "stacked"], "'stacked' is not one of auto, colocated, split, aggregated"),
        (["--devices", "0", "--encoder-devices", "1"], "give only one of them"),
    ],
)
def test_options_that_contradict_the_layout_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        _config(*arguments)


def test_what_the_layout_chooses_for_each_instance_is_no_option_of_serve() -> None:
    offered = {action.dest for action in serve.parser()._actions}
    assert offered.isdisjoint({"core_share", "nice"})
