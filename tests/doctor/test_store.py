"""What doctor says of a shared cache."""

from __future__ import annotations

from pathlib import Path

from chiasm.doctor.report import Verdict
from chiasm.doctor.store import store

from ..store_server import running


def verdicts(url: str) -> dict[str, Verdict]:
    return {result.check: result.verdict for result in store(url)}


def test_a_server_that_evicts_is_fine_and_one_without_limit_is_warned_of() -> None:
    with running("--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru") as server:
        assert set(verdicts(server.url).values()) == {Verdict.OK}
        server.call("CONFIG", "SET", "maxmemory-policy", "noeviction")
        assert verdicts(server.url)["shared cache memory"] is Verdict.WARNING
        server.call("CONFIG", "SET", "maxmemory", "0")
        assert verdicts(server.url)["shared cache memory"] is Verdict.WARNING
        server.call("CONFIG", "SET", "maxmemory", "1mb")
        assert verdicts(server.url)["shared cache travel"] is Verdict.PROBLEM


def test_a_server_that_is_down_or_refuses_is_a_problem_and_no_password_is_shown() -> None:
    with running("--requirepass", "right-secret") as server:
        results = list(store(f"redis://:wrong-secret@127.0.0.1:{server.port}"))
        assert [result.verdict for result in results] == [Verdict.PROBLEM]
        assert "secret" not in repr(results)
        server.kill()
        assert verdicts(server.url) == {"shared cache": Verdict.PROBLEM}
    assert verdicts("redis://:secret@host:port") == {"shared cache": Verdict.PROBLEM}


def test_a_folder_is_fine(tmp_path: Path) -> None:
    assert set(verdicts(f"file://{tmp_path}/store").values()) == {Verdict.OK}
