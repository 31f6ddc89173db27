"""What proves that an embedding was passed on, and what does not. With real instances: test_deployments.py."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from chiasm.doctor import Result
from chiasm.doctor.client import Limits
from chiasm.doctor.end_to_end import MAX_PAIRS, chains, pairs
from chiasm.doctor.observed import Observed
from chiasm.doctor.running import examine_instances
from tests.doctor import played
from tests.doctor.played import Played
from tests.doctor.results import collected, problem, verdicts, warning

ENCODED, LOADED, KV = "chiasm_images_encoded_total", "chiasm_ec_loads_total", "chiasm_kv_transfers_total"


LIMITS = Limits(message_seconds=20, count_seconds=0)
"""The instances here count before they answer."""


async def travel(*instances: Played, limits: Limits = LIMITS) -> list[Result]:
    """Return the results about images that were sent."""
    async with AsyncExitStack() as stack:
        urls: dict[str, list[str]] = {}
        for one in instances:
            await stack.enter_async_context(one)
            urls.setdefault(one.role, []).append(one.url)
        found = await collected(examine_instances(urls, limits=limits))
    return [one for one in found if one.check in ("embedding travels", "KV travels", "images")]


async def test_an_embedding_that_is_encoded_once_and_loaded_is_ok() -> None:
    encoder, pd = played.encoder(), played.reader()
    assert verdicts(await travel(encoder, pd)) == ["ok"]
    (sent,) = encoder.bodies[0]["messages"][0]["content"]
    (embeds, text) = pd.bodies[0]["messages"][0]["content"]
    assert sent["type"] == "image_url"
    assert embeds == {"type": "image_embeds", "image_embeds": played.METADATA, "uuid": sent["uuid"]}
    assert text["type"] == "text"


async def test_each_pair_gets_an_image_of_its_own() -> None:
    encoders, pds = [played.encoder(), played.encoder()], [played.reader(), played.reader()]
    assert verdicts(await travel(*encoders, *pds)) == ["ok"] * 4
    names = [body["messages"][0]["content"][0]["uuid"] for one in encoders for body in one.bodies]
    assert len(set(names)) == 4


async def test_an_embedding_that_does_not_arrive_is_a_problem() -> None:
    pd = played.reader(ec_store="t" * 32)
    pd.status = 503
    found = problem(await travel(played.encoder(), pd))
    assert "answered HTTP 503: no embedding came within 2 s" in found.says
    assert "different folders" in found.do


async def test_an_encoder_that_fails_is_a_problem() -> None:
    encoder = played.encoder()
    encoder.status = 500
    assert "was sent an image, and answered HTTP 500" in problem(await travel(encoder, played.reader())).says


@pytest.mark.parametrize(
    "reply",
    [[], {}, {"ec_transfer_params": None}, {"ec_transfer_params": 7}, {"ec_transfer_params": {"a": {"metadata": {}}}}],
    ids=["list", "nothing", "null", "number", "another image"],
)
async def test_an_encoder_whose_answer_names_no_embedding_is_a_problem(reply: object) -> None:
    encoder = played.encoder()
    encoder.reply = reply
    assert "was sent an image, and answered" in problem(await travel(encoder, played.reader())).says


@pytest.mark.parametrize("handle", [None, 7, {}])
async def test_a_prefill_instance_that_answers_without_a_handle_is_a_problem(handle: object) -> None:
    prefill = played.reader("prefill", kv_connector="c")
    prefill.reply = {"kv_transfer_params": handle}
    found = problem(await travel(played.encoder(), prefill, played.decode(kv_connector="c")))
    assert "kv_transfer_params" in found.says


async def test_an_answer_without_counters_is_no_proof() -> None:
    pd = played.reader()
    pd.counts_are_shown = False
    assert "unproven" in warning(await travel(played.encoder(), pd)).says


async def test_a_pd_that_encodes_again_is_a_problem() -> None:
    pd = played.reader()
    pd.adds = {ENCODED: 1, LOADED: 1}
    assert "encoded again" in problem(await travel(played.encoder(), pd)).says


async def test_a_pd_that_loads_nothing_is_a_problem() -> None:
    pd = played.reader()
    pd.adds = {}
    assert "was not loaded" in problem(await travel(played.encoder(), pd)).says


async def test_an_encoder_that_encodes_nothing_is_a_problem() -> None:
    encoder = played.encoder()
    encoder.adds = {}
    assert "no encoder has encoded" in problem(await travel(encoder, played.reader())).says


async def test_images_of_other_requests_leave_it_unproven() -> None:
    encoder = played.encoder()
    encoder.adds = {ENCODED: 3}
    assert "3 images were encoded meanwhile" in warning(await travel(encoder, played.reader())).says
    assert len(encoder.bodies) == 3  # it has tried again


@pytest.mark.parametrize(
    ("of_encoder", "of_reader", "verdict"),
    [("encoded", "hit", "ok"), ("encoded", "waited", "ok"), ("hit", "hit", "warning"), ("encoded", "", "warning")],
)
async def test_server_timing_proves_it_among_images_of_other_requests(
    of_encoder: str, of_reader: str, verdict: str
) -> None:
    encoder, pd = played.encoder(), played.reader()
    encoder.adds = {ENCODED: 3}
    encoder.outcome, pd.outcome = of_encoder, of_reader
    assert verdicts(await travel(encoder, pd)) == [verdict]


async def test_counters_outweigh_server_timing() -> None:
    encoder, pd = played.encoder(), played.reader()
    encoder.outcome, pd.outcome, pd.adds = "encoded", "hit", {}
    assert verdicts(await travel(encoder, pd)) == ["problem"]


async def test_kv_that_is_fetched_is_ok() -> None:
    prefill, decode = played.reader("prefill", kv_connector="c"), played.decode(kv_connector="c")
    assert verdicts(await travel(played.encoder(), prefill, decode)) == ["ok", "ok"]
    assert prefill.bodies[0]["kv_transfer_params"]["do_remote_decode"] is True
    assert decode.bodies[0]["kv_transfer_params"]["remote_engine_id"] == "p"


async def test_each_encoder_sends_an_image_to_a_prefill_instance() -> None:
    good, broken = played.encoder(), played.encoder()
    broken.status = 503
    found = problem(await travel(good, broken, played.reader("prefill"), played.decode()))
    assert f"encoder {broken.url} was sent an image, and answered HTTP 503" in found.says


@pytest.mark.parametrize("numbers", [(1, 1, 1), (3, 1, 1), (1, 2, 3), (3, 2, 2), (2, 40, 1), (20, 3, 7)])
def test_all_pairs_of_encoders_and_prefills_and_of_prefills_and_decodes_occur(numbers: tuple[int, int, int]) -> None:
    roles = ("encoder", "prefill", "decode")
    made = [[Observed(f"{role}{n}", role) for n in range(count)] for role, count in zip(roles, numbers, strict=True)]
    ways = [tuple(one.url for one in way) for way in chains(*made)]
    assert {way[:2] for way in ways} == {(one.url, other.url) for one, other in pairs(made[0], made[1])}
    assert {way[1:] for way in ways} == {(one.url, other.url) for one, other in pairs(made[1], made[2])}


async def test_kv_that_is_not_fetched_is_a_problem() -> None:
    decode = played.decode(kv_connector="c")
    decode.adds = {}
    assert "no KV was fetched" in problem(await travel(played.encoder(), played.reader("prefill"), decode)).says


async def test_a_decode_instance_that_does_not_reach_prefill_is_a_problem() -> None:
    decode = played.decode(kv_connector="c")
    decode.status = 503
    assert (
        "sent its handle, answered HTTP 503"
        in problem(await travel(played.encoder(), played.reader("prefill"), decode)).says
    )


async def test_without_an_encoder_nothing_is_called_ok() -> None:
    assert verdicts(await travel(played.reader())) == ["skipped"]


async def test_pairs_are_skipped_when_time_is_over() -> None:
    encoder, pd = played.encoder(), played.reader()
    assert verdicts(await travel(encoder, pd, limits=replace(LIMITS, pairs_messages=0))) == ["skipped"]
    assert encoder.bodies == []


async def test_an_aggregated_instance_that_answers_is_ok() -> None:
    assert verdicts(await travel(Played("aggregated"))) == ["ok"]


@pytest.mark.parametrize(("encoders", "readers"), [(2, 3), (1, 40), (30, 7), (MAX_PAIRS, 1)])
def test_each_instance_is_in_at_least_one_pair(encoders: int, readers: int) -> None:
    made = [Observed(f"e{n}", "encoder") for n in range(encoders)]
    reading = [Observed(f"r{n}", "pd") for n in range(readers)]
    chosen = pairs(made, reading)
    assert {one.url for one, _ in chosen} == {one.url for one in made}
    assert {one.url for _, one in chosen} == {one.url for one in reading}
    assert len(chosen) <= max(MAX_PAIRS, encoders, readers)
