"""Options are the configurations' fields, and --help tells the configurations' defaults."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from chiasm.cli import options
from chiasm.cli.groups import OptionGroup
from chiasm.cli.serve import count_instances
from chiasm.cli.values import parse_size
from chiasm.ec_transfer import ECTransferConfig
from chiasm.engine.config import EngineConfig, Role
from chiasm.media import MediaConfig
from chiasm.proxy.config import ProxyConfig
from chiasm.server.config import ServerConfig

CONFIGURATIONS: dict[type[OptionGroup], type] = {
    options.EngineOptions: EngineConfig,
    options.ECOptions: ECTransferConfig,
    options.MediaOptions: MediaConfig,
    options.ServerOptions: ServerConfig,
    options.ProxyOptions: ProxyConfig,
}
OTHER_NAMES = {"ec_max_bytes": "max_bytes"}


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
    ("encoders", "pds", "aggregated", "expected"),
    [
        (None, None, None, {Role.ENCODER: 1, Role.PD: 1}),
        (3, None, None, {Role.ENCODER: 3, Role.PD: 1}),
        (None, 2, None, {Role.ENCODER: 1, Role.PD: 2}),
        (0, 1, None, {Role.PD: 1}),
        (None, None, 2, {Role.AGGREGATED: 2}),
        (1, 1, 1, {Role.ENCODER: 1, Role.PD: 1, Role.AGGREGATED: 1}),
    ],
)
def test_counts_that_are_not_given(
    encoders: int | None, pds: int | None, aggregated: int | None, expected: dict[Role, int]
) -> None:
    assert count_instances(encoders, pds, aggregated) == expected
