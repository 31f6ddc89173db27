"""Requests for embeddings that are late, never come, or are not what they should be."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from chiasm.http.timing import read_timing
from chiasm.integrations.vllm.outputs import WAITS
from chiasm.wire import AWAITED_PATH, LOST_PATH, Load

from .processes import CALL_SECONDS, Server
from .wire import chat, embeds_part, encode, image_bytes, image_part, name_of, published

QUESTION = "what shape is it?"
GRID = {"image_grid_thw": [1, 6, 6]}


def entry(store: Path, data: bytes) -> Path:
    return store / f"{name_of(data)}.safetensors"


def sized(data: bytes, size: tuple[int, int] = (96, 96)) -> dict[str, object]:
    """Return the image part that a proxy sends before the encoder has answered."""
    return embeds_part(name_of(data), {"image_size": [size[1], size[0]]})


def load_of(server: Server) -> Load:
    load = server.health().load
    assert load is not None
    return load


def test_a_late_embedding_is_waited_for(encoder: Server, pd: Server, aggregated: Server) -> None:
    data = image_bytes(10)
    expected = aggregated.answer(chat(image_part(data), QUESTION))
    before = pd.count("waits")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(pd.answer, chat(sized(data), QUESTION))
        pd.until(lambda: pd.metric("vllm:num_requests_waiting") == 1)
        encode(encoder, data)
        assert answer.result() == expected
    pd.until(lambda: pd.count("waits") == before + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_how_long_an_embedding_was_waited_for_is_told_in_the_head(encoder: Server, pd: Server, stream: bool) -> None:
    data = image_bytes(15 + stream)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(pd.post, chat(sized(data), QUESTION, stream=stream))
        pd.until(lambda: pd.metric("vllm:num_requests_waiting") == 1)
        encode(encoder, data)
        response = answer.result()
    entries = read_timing(response.headers["server-timing"])
    (stall,) = [one for one in entries if one.name == "stall"]
    (item,) = [one for one in entries if one.name.startswith("item")]
    assert (stall.seconds or 0) > 0
    assert (item.name, item.description) == ("item0", "waited")
    assert {"queue", "prefill", "ttft", "prompt_tokens", "cached_tokens"} <= {one.name for one in entries}
    assert ("total" in {one.name for one in entries}) == (not stream)
    assert WAITS not in response.text


def test_what_an_instance_has_to_do_is_told_with_its_health(encoder: Server, pd: Server) -> None:
    data, text = image_bytes(14), "and then there is something else to see: " * 100
    pd.answer(chat("hello"))  # from now on it knows what a token costs
    pd.until(lambda: load_of(pd).outstanding_seconds == 0)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(pd.answer, chat(sized(data), text))
        pd.until(lambda: load_of(pd).outstanding_seconds > 0)
        encode(encoder, data)
        answer.result()
    pd.until(lambda: load_of(pd).outstanding_seconds == 0)
    assert load_of(pd).kv_blocks_free
    assert load_of(encoder).kv_blocks_free is None


def test_an_embedding_that_never_comes_fails_its_requests(other_pd: Server) -> None:
    before = other_pd.count("failed_requests")
    with ThreadPoolExecutor(5) as pool:
        bodies = [chat(sized(image_bytes(11)), QUESTION, stream=number % 2 == 0) for number in range(5)]
        responses = list(pool.map(other_pd.post, bodies))
    assert {response.status_code for response in responses} == {503}
    other_pd.until(lambda: other_pd.count("failed_requests") == before + 5)
    other_pd.until(lambda: "did not arrive within" in other_pd.text())


def test_others_are_answered_meanwhile(encoder: Server, pd: Server, aggregated: Server) -> None:
    data, late = image_bytes(12), image_bytes(13)
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(pd.answer, chat(sized(late), QUESTION)) for _ in range(5)]
        pd.until(lambda: pd.metric("vllm:num_requests_waiting") == 5)
        assert pd.answer(chat(published(encoder, data), QUESTION)) == aggregated.answer(
            chat(image_part(data), QUESTION)
        )
        assert pd.answer(chat("hello")) == aggregated.answer(chat("hello"))
        assert not any(each.done() for each in waiting)
        encode(encoder, late)
        expected = aggregated.answer(chat(image_part(late), QUESTION))
        assert [each.result() for each in waiting] == [expected] * 5


HARMS = ("removed", "empty", "cut off", "foreign", "a folder")


@pytest.mark.parametrize("harm", HARMS)
def test_a_file_that_is_not_an_entry_counts_as_missing(
    encoder: Server, pd: Server, aggregated: Server, store: Path, harm: str
) -> None:
    data = image_bytes(20 + HARMS.index(harm))
    part, path = published(encoder, data), entry(store, data)
    match harm:
        case "removed":
            path.unlink()
        case "empty":
            os.truncate(path, 0)
        case "cut off":
            os.truncate(path, path.stat().st_size - 1)
        case "foreign":
            path.write_bytes(b"something else")
        case "a folder":
            path.unlink()
            path.mkdir()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(pd.answer, chat(part, QUESTION))
        pd.until(lambda: pd.metric("vllm:num_requests_waiting") == 1)
        if path.is_dir():
            path.rmdir()
        encode(encoder, data)  # it has the embedding in memory, and sees that the store has lost it
        assert answer.result() == aggregated.answer(chat(image_part(data), QUESTION))


def test_an_entry_of_another_size_is_removed_and_fails_its_request_if_it_comes_again(
    encoder: Server, pd: Server, store: Path
) -> None:
    data = image_bytes(30)
    ((name, metadata),) = encode(encoder, data).items()
    assert metadata["image_grid_thw"] != [1, 2, 2]

    def awaited() -> object:
        return httpx.get(f"{pd.url}{AWAITED_PATH}", timeout=CALL_SECONDS).json()

    with ThreadPoolExecutor() as pool:
        answer = pool.submit(pd.post, chat(embeds_part(name, {"image_grid_thw": [1, 2, 2]}), QUESTION))
        pd.until(lambda: not entry(store, data).exists())
        pd.until(lambda: awaited() == {"identifiers": [name]})
        encode(encoder, data)
        assert answer.result().status_code == 503
    assert pd.post(chat(embeds_part(name, metadata), QUESTION)).status_code == 200


def test_a_question_waits_in_the_engine_until_an_embedding_is_lost(
    encoder: Server, pd: Server, aggregated: Server
) -> None:
    data = image_bytes(31)
    name = name_of(data)

    def lost(*published: str) -> object:
        question = {"asker": "proxy", "published": published, "seconds": 60}
        return httpx.post(f"{pd.url}{LOST_PATH}", json=question, timeout=CALL_SECONDS).json()["identifiers"]

    with ThreadPoolExecutor() as pool:
        told = pool.submit(lost, name)
        answer = pool.submit(pd.answer, chat(sized(data), QUESTION))
        assert told.result() == [name]
        assert lost(name) == [name]  # it is lost still
        encode(encoder, data)
        assert answer.result() == aggregated.answer(chat(image_part(data), QUESTION))
        told = pool.submit(lost, name)
        while not told.done():  # the question may not have arrived yet
            assert lost() == []
        assert told.result() == []


@pytest.mark.parametrize("name", ["../escaped", "a/b", "nul\0", "x" * 10_000, "A" * 64])
@pytest.mark.parametrize("role", ["encoder", "pd"])
def test_a_bad_name_is_refused_and_nothing_is_written_outside(
    encoder: Server, pd: Server, store: Path, role: str, name: str
) -> None:
    before = sorted(store.parent.glob("*"))
    if role == "encoder":
        response = encoder.post(chat(image_part(image_bytes(31), name), max_tokens=1))
    else:
        response = pd.post(chat(embeds_part(name, GRID), QUESTION))
        assert pd.post(chat(embeds_part(name, {"image_size": [96, 96]}), QUESTION)).status_code == 400
    assert response.status_code == (500 if role == "encoder" else 400)
    assert sorted(store.parent.glob("*")) == before
    assert pd.post(chat("hello")).status_code == encoder.post(chat(image_part(image_bytes(32)))).status_code == 200


def test_ten_identical_at_once(encoder: Server, pd: Server, aggregated: Server) -> None:
    data = image_bytes(33)
    saves, loads = encoder.count("saves"), pd.count("loads")
    with ThreadPoolExecutor(11) as pool:
        answers = [pool.submit(pd.answer, chat(sized(data), QUESTION)) for _ in range(10)]
        for each in [pool.submit(encode, encoder, data) for _ in range(10)]:
            each.result()
        expected = aggregated.answer(chat(image_part(data), QUESTION))
        assert [answer.result() for answer in answers] == [expected] * 10
    pd.until(lambda: pd.count("loads") == loads + 1)
    encoder.until(lambda: encoder.count("saves") == saves + 1)


def test_prefill_begins_before_all_images_are_there(encoder: Server, pd: Server, aggregated: Server) -> None:
    first, second, between = image_bytes(34), image_bytes(35), "and then there is something else to see: " * 4
    encode(encoder, first)
    hits = pd.count("hits")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(pd.answer, chat(sized(first), between, sized(second), QUESTION))
        pd.until(lambda: pd.count("hits") == hits + 1)  # the first is loaded, so prefill has begun
        pd.until(lambda: pd.metric("vllm:num_requests_running") == 1)
        encode(encoder, second)
        assert answer.result() == aggregated.answer(chat(image_part(first), between, image_part(second), QUESTION))
