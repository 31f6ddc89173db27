"""Options are the configurations' fields, and --help tells the configurations' defaults."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from chiasm.cli import options
from chiasm.cli.groups import OptionGroup
from chiasm.cli.instance import ec_config, kv_config
from chiasm.cli.serve import count_instances
from chiasm.cli.values import parse_size
from chiasm.ec_transfer import ECTransferConfig, ECTransferRole
from chiasm.engine.config import EngineConfig
from chiasm.errors import ConfigurationError
from chiasm.kv_transfer import KVTransferConfig, KVTransferRole
from chiasm.media import MediaConfig
from chiasm.proxy.config import ProxyConfig
from chiasm.server.config import ServerConfig
from chiasm.wire import Role

CONFIGURATIONS: dict[type[OptionGroup], type] = {
    options.EngineOptions: EngineConfig,
    options.ECOptions: ECTransferConfig,
    options.KVOptions: KVTransferConfig,
    options.KVAddressOptions: KVTransferConfig,
    options.MediaOptions: MediaConfig,
    options.ServerOptions: ServerConfig,
    options.ProxyOptions: ProxyConfig,
}
OTHER_NAMES = {
    "ec_max_bytes": "max_bytes",
    "kv_connector": "connector",
    "kv_connector_module_path": "connector_module_path",
    "kv_lease_seconds": "lease_seconds",
    "kv_host": "host",
    "kv_port": "port",
}


def _fields(of: Any) -> list[Field[Any]]:
    assert is_dataclass(of)
    return list(fields(of))


CASES = [(group, option.name) for group in CONFIGURATIONS for option in _fields(group)]


@pytest.mark.parametrize(("group", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_an_option_sets_a_field_and_shows_its_default(group: type[OptionGroup], name: str) -> None:
    by_name = {field.name: field for field in _fields(CONFIGURATIONS[group])}
    field = by_name[OTHER_NAMES.get(name, name)]
    shown = get_type_hints(group, include_extras=True)[name].__metadata__[0].show_default
    default = field.default
    assert default is not MISSING
    if isinstance(default, int | float) and default:
        assert isinstance(shown, str)
        assert (parse_size(shown) if name.endswith("_bytes") else float(shown)) == default
    elif isinstance(default, str):
        assert shown.split()[0] == default
    else:
        assert not default


def test_only_what_was_given_is_passed_on(tmp_path: Path) -> None:
    media = options.MediaOptions(max_media_bytes=5, allowed_media_domains=["a", "b"], allowed_local_media_path=tmp_path)
    assert options.MediaOptions().arguments() == ()
    assert media.arguments() == (
        "--max-media-bytes",
        "5",
        "--allowed-local-media-path",
        str(tmp_path),
        "--allowed-media-domains",
        "a",
        "--allowed-media-domains",
        "b",
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {Role.ENCODER: 1, Role.PD: 1}),
        ({"encoders": 3}, {Role.ENCODER: 3, Role.PD: 1}),
        ({"pds": 2}, {Role.ENCODER: 1, Role.PD: 2}),
        ({"encoders": 0, "pds": 1}, {Role.PD: 1}),
        ({"aggregated": 2}, {Role.AGGREGATED: 2}),
        ({"encoders": 1, "pds": 1, "aggregated": 1}, {Role.ENCODER: 1, Role.PD: 1, Role.AGGREGATED: 1}),
        ({"prefills": 1, "decodes": 2}, {Role.ENCODER: 1, Role.PREFILL: 1, Role.DECODE: 2}),
        ({"encoders": 0, "prefills": 1, "decodes": 1}, {Role.PREFILL: 1, Role.DECODE: 1}),
        ({"prefills": 0, "decodes": 0}, {Role.ENCODER: 1, Role.PD: 1}),
    ],
    ids=str,
)
def test_counts_that_are_not_given(given: dict[str, int], expected: dict[Role, int]) -> None:
    counts = dict.fromkeys(("encoders", "pds", "aggregated", "prefills", "decodes")) | given
    assert count_instances(**counts) == expected


def test_a_prefill_instance_takes_embeddings_and_leaves_kv(tmp_path: Path) -> None:
    ec = ec_config(Role.PREFILL, options.ECOptions(shared_storage_path=tmp_path, ec_max_bytes=7))
    address = options.KVAddressOptions(kv_host="prefill-0.example", kv_port=7000)
    kv = kv_config(Role.PREFILL, options.KVOptions(kv_lease_seconds=5), address)
    assert ec == ECTransferConfig(role=ECTransferRole.CONSUMER, shared_storage_path=tmp_path, max_bytes=7)
    assert kv == KVTransferConfig(role=KVTransferRole.PRODUCER, host="prefill-0.example", port=7000, lease_seconds=5)


def test_a_decode_instance_takes_kv_alone() -> None:
    assert ec_config(Role.DECODE, options.ECOptions()) is None
    kv = kv_config(Role.DECODE, options.KVOptions(kv_connector="NixlConnector"), options.KVAddressOptions())
    assert kv == KVTransferConfig(connector="NixlConnector", role=KVTransferRole.CONSUMER)


@pytest.mark.parametrize("role", [Role.ENCODER, Role.PD, Role.AGGREGATED])
def test_other_instances_exchange_no_kv(role: Role) -> None:
    assert kv_config(role, options.KVOptions(), options.KVAddressOptions()) is None
    with pytest.raises(ConfigurationError, match=f"--kv-connector, --kv-host: .* is {role}"):
        kv_config(role, options.KVOptions(kv_connector="X"), options.KVAddressOptions(kv_host="x"))


@pytest.mark.parametrize(
    ("kv", "address", "names"),
    [
        (options.KVOptions(), options.KVAddressOptions(kv_port=7000), "--kv-port"),
        (options.KVOptions(kv_lease_seconds=3), options.KVAddressOptions(kv_host="x"), "--kv-lease-seconds, --kv-host"),
    ],
)
def test_what_is_prefills_alone_is_refused_by_decode(
    kv: options.KVOptions, address: options.KVAddressOptions, names: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{names}: decode instances come to prefill instances"):
        kv_config(Role.DECODE, kv, address)


def test_a_decode_instance_refuses_a_place_for_embeddings() -> None:
    with pytest.raises(ConfigurationError, match="leave out --connector, --ec-max-bytes"):
        ec_config(Role.DECODE, options.ECOptions(connector="X", ec_max_bytes=1))


@pytest.mark.parametrize("role", [Role.ENCODER, Role.PD, Role.PREFILL])
def test_a_place_for_embeddings_is_needed(role: Role) -> None:
    with pytest.raises(ConfigurationError, match="needs --shared-storage-path"):
        ec_config(role, options.ECOptions())
