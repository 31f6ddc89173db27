"""Who may see what is the operator's."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.errors import AuthenticationError
from chiasm.http.admin import AdminCheck

KEY = "a key of the operator".replace(" ", "-")


def scope(client: str | None, **headers: str) -> dict[str, object]:
    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "headers": fields, "client": None if client is None else (client, 1)}


@pytest.mark.parametrize(
    ("client", "headers", "expected"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {}, True),
        ("::ffff:127.0.0.1", {}, True),
        ("::ffff:10.0.0.1", {}, False),
        (None, {}, True),
        ("10.0.0.1", {}, False),
        ("127.0.0.1", {"x_forwarded_for": "1.2.3.4"}, False),
        ("127.0.0.1", {"forwarded": "for=1.2.3.4"}, False),
        ("127.0.0.1", {"x_forwarded_proto": "https"}, False),
        ("127.0.0.1", {"x_real_ip": "1.2.3.4"}, False),
        ("127.0.0.1", {"via": "1.1 nginx"}, False),
        (None, {"x_forwarded_for": "1.2.3.4"}, False),
        ("10.0.0.1", {"authorization": f"Bearer {KEY}"}, False),
    ],
)
def test_without_a_key_it_is_who_asks_from_the_machine_itself(
    client: str | None, headers: dict[str, str], expected: bool
) -> None:
    check = AdminCheck()
    assert check.may_see(scope(client, **headers)) is expected
    with pytest.raises(AuthenticationError):
        check.check_may_change(scope(client, **headers))


@pytest.mark.parametrize(
    ("client", "authorization", "expected"),
    [
        ("127.0.0.1", "", False),
        ("127.0.0.1", f"Bearer {KEY}x", False),
        ("127.0.0.1", f"Bearer {KEY}", True),
        ("10.0.0.1", f"Bearer {KEY}", True),
    ],
)
def test_with_a_key_it_is_who_has_it(client: str, authorization: str, expected: bool) -> None:
    check = AdminCheck(KEY)
    asking = scope(client, authorization=authorization)
    assert check.may_see(asking) is expected
    if expected:
        check.check_may_see(asking)
        check.check_may_change(asking)
    else:
        with pytest.raises(AuthenticationError, match="admin key"):
            check.check_may_see(asking)


@pytest.mark.parametrize("admin_key", [None, KEY])
def test_the_supervisor_may_see_and_change_nothing(admin_key: str | None) -> None:
    supervisor = "a-key-of-the-supervisor"
    check = AdminCheck(admin_key, supervisor_key=supervisor)
    asking = scope("10.0.0.1", authorization=f"Bearer {supervisor}")
    assert check.may_see(asking)
    assert not check.may_see(scope("10.0.0.1", authorization=f"Bearer {supervisor}x"))
    assert check.has_key is (admin_key is not None)
    with pytest.raises(AuthenticationError):
        check.check_may_change(asking)


async def test_the_keys_of_a_file_that_is_replaced_count_at_once_and_one_that_is_not_fit_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, other = tmp_path / "admin.keys", "another-key-of-the-operator"
    file.write_text(f"{KEY}\n")
    check = AdminCheck(file=file)
    file.write_text(f"{other}\n")
    await check.read_again()
    for content in ("", "short\n"):
        file.write_text(content)
        await check.read_again()
    file.unlink()
    await check.read_again()
    assert caplog.text.count("the admin keys stay as they are") == 3
    known = {key: check.may_see(scope("10.0.0.1", authorization=f"Bearer {key}")) for key in (KEY, other)}
    assert known == {KEY: False, other: True}
    assert check.has_key
