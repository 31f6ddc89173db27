"""What work costs instances is shown: what each has measured, and what the proxy has learned."""

from __future__ import annotations

import pytest

from chiasm.doctor.client import Limits
from chiasm.doctor.costs import costs
from chiasm.doctor.observed import Observed
from chiasm.doctor.running import examine_proxy
from chiasm.wire import Costs, Health, ImageCost
from tests.doctor import played
from tests.doctor.results import collected, verdicts
from tests.doctor.test_observed import answering

LANGUAGE = Costs(
    prefill_seconds_per_token=0.0002, decode_step_seconds=0.0081, images=[ImageCost(pixels=65536, tokens=16)]
)
ENCODER = Costs(
    images=[
        ImageCost(pixels=65536, tokens=16, encode_seconds=0.005),
        ImageCost(pixels=1048576, tokens=256, encode_seconds=0.12),
    ]
)


def instance(role: str, measured: Costs | None, learned: Costs | None = None) -> Observed:
    return Observed(f"http://{role}:1", role, Health(role=role, costs=measured), learned=learned)


@pytest.mark.parametrize(
    ("role", "measured", "says"),
    [
        ("pd", LANGUAGE, "pd http://pd:1: a prompt token 0.2 ms; a step of decoding 8.1 ms"),
        ("encoder", ENCODER, "encoder http://encoder:1: to encode 65,536 pixels 5 ms, 1,048,576 pixels 120 ms"),
    ],
)
def test_what_was_measured_is_shown(role: str, measured: Costs, says: str) -> None:
    for learned in (None, measured):
        (found,) = costs([instance(role, measured, learned)])
        assert (found.verdict, found.says) == ("ok", says)


def test_what_was_learned_is_shown_beside_it() -> None:
    learned = Costs(prefill_seconds_per_token=0.0003, decode_step_seconds=0.009)
    (found,) = costs([instance("pd", LANGUAGE, learned)])
    assert found.says.endswith("a prompt token 0.2 ms (learned 0.3 ms); a step of decoding 8.1 ms (learned 9 ms)")
    learned = Costs(images=[ImageCost(pixels=1048576, encode_seconds=0.15)])
    (found,) = costs([instance("encoder", ENCODER, learned)])
    assert found.says.endswith("65,536 pixels 5 ms, 1,048,576 pixels 120 ms (learned 150 ms)")


def test_instances_that_report_nothing_are_skipped() -> None:
    known, unknown = instance("encoder", ENCODER), instance("pd", None, LANGUAGE)
    assert verdicts(costs([known, unknown])) == ["ok", "skipped"]


async def test_the_proxy_says_what_it_has_learned() -> None:
    said = {"prefill_seconds_per_token": 0.0002}
    async with played.reader(costs=said) as pd:
        listed = {"url": pd.url, "role": "pd", "state": "healthy", "costs": {"prefill_seconds_per_token": 0.0004}}
        page = {"status": "ok", "models": ["tiny"], "instances": [listed]}
        async with answering({"/health": page}) as url:
            found = await collected(examine_proxy(url, limits=Limits(message_seconds=20, count_seconds=0)))
    (shown,) = [one for one in found if one.check == "costs"]
    assert shown.says == f"pd {pd.url}: a prompt token 0.2 ms (learned 0.4 ms)"
