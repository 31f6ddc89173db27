"""What --ec-store takes, and what is shown of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.ec_transfer import ECTransferConfig
from chiasm.ec_transfer.stores import StoreAddress
from chiasm.errors import ConfigurationError
from chiasm.launch import DeploymentConfig
from chiasm.proxy import ProxyConfig


def test_a_url_names_host_port_database_user_and_password() -> None:
    found = StoreAddress.parse("rediss://me:p%40ss@[::1]:7000/3?ttl_seconds=60", environment={})
    assert (found.host, found.port, found.database, found.user, found.password) == ("::1", 7000, 3, "me", "p@ss")
    assert found.has_tls
    assert found.ttl_seconds == 60
    assert StoreAddress.parse("redis://host", environment={}).port == 6379


def test_a_folder_has_a_limit_of_its_own() -> None:
    found = StoreAddress.parse("file:///mnt/a%20b?max_gib=2", environment={})
    assert (found.folder, found.max_bytes) == (Path("/mnt/a b"), 2 << 30)


def test_user_and_password_may_be_in_the_environment() -> None:
    environment = {"CHIASM_EC_STORE_USER": "me", "CHIASM_EC_STORE_PASSWORD": "secret"}
    found = StoreAddress.parse("redis://host", environment)
    assert (found.user, found.password) == ("me", "secret")
    assert StoreAddress.parse("redis://you:other@host", environment).password == "other"


def test_nothing_that_is_shown_has_the_password() -> None:
    url = "redis://me:secret@host/1"
    address = StoreAddress.parse(url)
    assert str(address) == "redis://host:6379/1"
    assert "secret" not in repr(address)
    assert "secret" not in repr(ECTransferConfig(store=url))
    assert "secret" not in repr(ProxyConfig(pds=("http://a",), store=url))
    assert "secret" not in repr(DeploymentConfig("demo", ec_store=url))


@pytest.mark.parametrize(
    "url",
    [
        "host:6379",
        "redis://",
        "http://secret@host",
        "redis://:secret@host:port",
        "redis://:secret@host:70000",
        "redis://:secret@host/name",
        "redis://:secret@host/-1",
        "redis://:secret@host/0?ttl=5",
        "redis://:secret@host/0?ttl_seconds=-5",
        "redis://:sec#ret@host",
        "redis://[::1",
        "file://folder",
        "file:///folder?max_gib=0",
        "file:///folder?ttl_seconds=5",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ConfigurationError, match="--ec-store") as refused:
        StoreAddress.parse(url)
    assert "sec" not in refused.value.message.replace("seconds", "")
