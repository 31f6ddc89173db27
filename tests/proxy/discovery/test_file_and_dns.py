"""Instances from a file and from DNS."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from chiasm.errors import ConfigurationError
from chiasm.http import lookup, watch
from chiasm.proxy.discovery import dns
from chiasm.proxy.discovery.base import Found, Source, Tell
from chiasm.proxy.discovery.dns import DnsSource
from chiasm.proxy.discovery.file import FileSource, read_instances
from chiasm.proxy.discovery.sources import Sources, parse_source
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.membership import Membership
from chiasm.proxy.upstream import UpstreamError
from chiasm.tasks import end_tasks
from chiasm.wire import Health, Role
from tests.unreadable import REASON, make_unreadable

ENCODER = Found("http://10.0.0.5:8001", Role.ENCODER)
PD = Found("http://10.0.0.6:8001", Role.PD)


class Heard:
    """What a source tells, and a way to wait for it."""

    def __init__(self) -> None:
        self._told: asyncio.Queue[Sequence[Found]] = asyncio.Queue()

    def __call__(self, found: Sequence[Found]) -> None:
        self._told.put_nowait(found)

    async def next(self) -> Sequence[Found]:
        return await asyncio.wait_for(self._told.get(), 60)

    @property
    def is_silent(self) -> bool:
        return self._told.empty()


async def running(source: Source, heard: Heard) -> AsyncIterator[None]:
    task = asyncio.create_task(source.run(heard))
    yield
    await end_tasks(task)


# ---- files -------------------------------------------------------------------------------------------------------------


def test_a_file_lists_instances_in_json_or_yaml(tmp_path: Path) -> None:
    json, yaml = tmp_path / "fleet.json", tmp_path / "fleet.yaml"
    json.write_text(
        '[{"url": "http://10.0.0.5:8001/", "role": "encoder"}, {"url": "http://10.0.0.6:8001", "role": "pd"}]'
    )
    yaml.write_text("- {url: 'http://10.0.0.5:8001', role: encoder}\n- url: http://10.0.0.6:8001\n  role: pd\n")
    assert read_instances(json) == read_instances(yaml) == [ENCODER, PD]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a list of instances"),
        ('{"url": "http://a"}', "is not a list of instances"),
        ('[{"url": "http://a"}]', "is not a list of instances"),
        ('[{"url": "http://a", "role": "judge"}]', "is not a list of instances"),
        ('[{"url": "http://a", "role": "pd", "weight": 1}]', "is not a list of instances"),
        ('[{"url": "a", "role": "pd"}]', "is not the base URL"),
        ('[{"url": "http://a", "role": "pd"}, {"url": "http://a/", "role": "encoder"}]', "lists a URL twice"),
        ("[" + ", ".join('{"url": "http://a", "role": "pd"}' for _ in range(1025)) + "]", "1024 are the limit"),
        (" " * (1 << 20) + "[]", "larger than 1 MiB"),
    ],
)
def test_a_file_that_is_no_list_of_instances_is_one_clear_error(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "fleet.json"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        read_instances(file)


def test_so_is_a_date_that_there_is_not(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("- {url: 2026-11-31, role: pd}")
    with pytest.raises(ConfigurationError, match="is not a list of instances"):
        read_instances(file)


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        read_instances(tmp_path / "none")


async def test_a_file_that_is_replaced_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "INTERVAL_SECONDS", 0.01)
    file, new, heard = tmp_path / "fleet.json", tmp_path / "new", Heard()
    file.write_text('[{"url": "http://10.0.0.5:8001", "role": "encoder"}]')
    source = FileSource(f"file:{file}", file)
    async for _ in running(source, heard):
        assert await heard.next() == [ENCODER]
        file.write_text("[{")
        await source.read(heard)
        assert heard.is_silent
        assert "is not used" in caplog.text
        new.write_text('[{"url": "http://10.0.0.6:8001", "role": "pd"}]')
        os.replace(new, file)
        assert await heard.next() == [PD]


async def test_a_file_that_could_not_be_read_is_read_again_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "INTERVAL_SECONDS", 0.001)
    file, heard = tmp_path / "fleet.json", Heard()
    file.write_text('[{"url": "http://10.0.0.5:8001", "role": "encoder"}]')
    make_unreadable(monkeypatch, file, times=3)
    async for _ in running(FileSource(f"file:{file}", file), heard):
        assert await heard.next() == [ENCODER]
    assert caplog.text.count(REASON) == 1, "the same reason is logged once"


# ---- DNS ---------------------------------------------------------------------------------------------------------------


class Names:
    """A resolver that answers what a test tells it, one answer after the other."""

    def __init__(self, *answers: list[str] | OSError) -> None:
        self.answers = list(answers)
        self.is_asked_again = asyncio.Event()

    async def __call__(self, name: str, port: int) -> list[str]:
        assert (name, port) == ("encoders", 8001)
        if not self.answers:
            self.is_asked_again.set()
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer


async def test_each_address_of_a_name_is_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "INTERVAL_SECONDS", 0.0)
    names = Names(["10.0.0.6", "10.0.0.5"], ["10.0.0.5", "10.0.0.6"], ["fd00::1"], [])
    source, heard = DnsSource("dns:encoders:8001", "encoders", 8001, Role.ENCODER, names), Heard()
    assert source.keeps
    async for _ in running(source, heard):
        assert await heard.next() == [ENCODER, Found("http://10.0.0.6:8001", Role.ENCODER)]
        assert await heard.next() == [Found("http://[fd00::1]:8001", Role.ENCODER)]
        assert await heard.next() == []
        await names.is_asked_again.wait()
        assert heard.is_silent


async def test_a_resolver_that_fails_or_does_not_answer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(lookup, "LOOKUP_SECONDS", 0.01)
    failure = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    names = Names(["10.0.0.5"], failure, failure, ["10.0.0.5"])
    source, heard = DnsSource("dns:encoders:8001", "encoders", 8001, Role.ENCODER, names), Heard()
    async for _ in running(source, heard):
        assert await heard.next() == [ENCODER]
        await names.is_asked_again.wait()
        names.is_asked_again.clear()
        await names.is_asked_again.wait()  # the lookup before has taken too long
        assert heard.is_silent


# ---- arguments, and instances that are asked for their roles ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("", "is nothing to discover"),
        ("etcd:x", "write file:PATH, dns:NAME:PORT or k8s:SELECTOR"),
        ("file:", "is nothing to discover"),
        ("dns:name", "names no port"),
        ("dns:name:0", "names no port"),
        ("dns:name:1?role=judge", "'judge' is no role"),
        ("dns:name:1?colour=red", "unknown setting 'colour'"),
        ("k8s:app=x", "works in a pod of Kubernetes alone"),
    ],
)
def test_an_argument_that_names_no_source_is_one_clear_error(
    argument: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigurationError, match=message):
        parse_source(argument)


async def test_an_instance_whose_source_does_not_know_its_role_is_asked_until_it_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chiasm.proxy.discovery.sources._ASK_SECONDS", 0.01)
    fleet, answers, added = Fleet(), ["", "pd"], asyncio.Event()
    fleet.on_add = lambda instance: added.set()

    async def role_at(url: str) -> Role:
        if answer := answers.pop(0):
            return Role(answer)
        raise UpstreamError("no answer")

    names = Names(["10.0.0.5"])
    source = DnsSource("dns:encoders:8001", "encoders", 8001, None, names)
    sources = Sources([source], Membership(fleet), role_at)
    sources.start()
    await asyncio.wait_for(added.wait(), 60)
    (instance,) = fleet.instances
    assert (instance.url, instance.role, instance.sources) == (ENCODER.url, Role.PD, ("dns:encoders:8001",))
    await sources.close()


async def test_an_address_that_goes_to_an_instance_with_another_role_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chiasm.proxy.discovery.sources._ASK_SECONDS", 0.01)
    fleet, added = Fleet(), asyncio.Queue[Role]()
    fleet.on_add = lambda instance: added.put_nowait(instance.role)
    answers = [Role.PD, Role.ENCODER]

    async def role_at(url: str) -> Role:
        return answers.pop(0)

    source = DnsSource("dns:encoders:8001", "encoders", 8001, None, Names(["10.0.0.5"]))
    sources = Sources([source], Membership(fleet), role_at)
    sources.start()
    assert await asyncio.wait_for(added.get(), 60) is Role.PD
    (instance,) = fleet.instances
    fleet.succeed(instance, Health(model="tiny", role="encoder"))
    assert await asyncio.wait_for(added.get(), 60) is Role.ENCODER
    assert [one.url for one in fleet.instances] == [ENCODER.url]
    await sources.close()


async def test_a_source_that_fails_for_a_reason_that_nobody_foresaw_is_run_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("chiasm.proxy.discovery.sources._ASK_SECONDS", 0.01)
    fleet, added = Fleet(), asyncio.Event()
    fleet.on_add = lambda instance: added.set()

    class Failing(Source):
        runs = 0

        async def run(self, tell: Tell) -> None:
            self.runs += 1
            if self.runs == 1:
                raise RuntimeError("nobody thought of it")
            tell([ENCODER])
            await asyncio.Event().wait()

    async def role_at(url: str) -> Role:
        raise UpstreamError("no answer")

    sources = Sources([Failing("failing:")], Membership(fleet), role_at)
    sources.start()
    await asyncio.wait_for(added.wait(), 60)
    assert [instance.url for instance in fleet.instances] == [ENCODER.url]
    assert "nobody thought of it" in caplog.text
    await sources.close()
