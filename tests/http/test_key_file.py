"""The file of API keys: one a line, or YAML with what each may do."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.errors import ConfigurationError
from chiasm.http.key_file import ApiKey, read_api_keys

FIRST, SECOND, THIRD = (name * 4 for name in ("first", "second", "third"))


def read(tmp_path: Path, text: str) -> list[ApiKey]:
    path = tmp_path / "keys"
    path.write_text(text)
    return read_api_keys(path)


def test_it_has_one_key_a_line(tmp_path: Path) -> None:
    assert read(tmp_path, f"{FIRST}\n\n  {SECOND}  \n") == [ApiKey(FIRST), ApiKey(SECOND)]


def test_it_has_names_tenants_and_limits(tmp_path: Path) -> None:
    text = f"""
# of the team
keys:
  - {{key: {FIRST}, name: a, tenant: acme, max_requests_in_flight: 2, max_requests_per_minute: 60}}
  - key: {SECOND}
"""
    assert read(tmp_path, text) == [ApiKey(FIRST, "a", "acme", 2, 60), ApiKey(SECOND)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (f"- {{key: {FIRST}, nmae: a}}", "unknown field `nmae`"),
        ("- {name: a}", "missing required field `key`"),
        ("- {key: 1234567890123456}", "Expected `str`"),
        (f"- {{key: {FIRST}, max_requests_in_flight: 0}}", "`int` >= 1"),
        (f"- {{key: {FIRST}, max_requests_per_minute: 100001}}", "`int` <= 100000"),
        (f"- {{key: {FIRST}, name: 'a b'}}", "matching regex"),
        (f"- {{key: {FIRST}, name: {'a' * 65}}}", "matching regex"),
        (f"- {{key: {FIRST}}}\n- {{key: {FIRST}, name: a}}", "holds a key twice"),
        (f"- {{key: {FIRST}, name: a}}\n- {{key: {SECOND}, name: a, tenant: b}}", "different tenants or limits"),
        ("- {key: short}", "at least 16 characters"),
        (" []", "holds no key"),
        (f"- {{key: {FIRST}", "not valid YAML, at line"),
        (f"- {{key: {FIRST}, name: 2026-11-31}}", "not valid YAML"),
        (f"- {{key: {FIRST}}}\nkeys:\n- {{key: {SECOND}}}", "not valid YAML, at line 3"),
        (f"- {{key: {FIRST}, tenant: a, tenant: b}}", "not valid YAML, at line 2"),
    ],
)
def test_what_is_wrong_is_named_and_no_key_is_shown(tmp_path: Path, entries: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as refusal:
        read(tmp_path, f"keys:\n{entries}")
    assert "--api-key-file" in refusal.value.message
    assert FIRST not in refusal.value.message


def test_a_file_of_absurd_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="larger than 4 MiB"):
        read(tmp_path, FIRST * (1 << 18))
    with pytest.raises(ConfigurationError, match="more than 10000 keys"):
        read(tmp_path, "".join(f"{number:016}\n" for number in range(10_001)))
