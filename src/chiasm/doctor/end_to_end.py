"""Checks whether an embedding really passes: an image that no cache can have is sent, and counters prove who did what with it.

A proxy chooses instances by their load, so requests through it would leave most pairs of instances untested. Therefore the
messages of a proxy are sent to the instances themselves: to every pair if there are few.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product

from chiasm.doctor import messages
from chiasm.doctor.client import Client, NoAnswerError
from chiasm.doctor.fleet import EMBEDDING_READERS
from chiasm.doctor.messages import Counters, read_counters
from chiasm.doctor.observed import Observed, ObservedProxy
from chiasm.doctor.report import Check, Result
from chiasm.wire import Role

_EMBEDDING = Check("embedding travels")
_KV = Check("KV travels")
_THROUGH = Check("through the proxy")
_SEE_IMAGES = (Role.ENCODER, Role.AGGREGATED)
_IMAGES = Check("images")

MAX_PAIRS = 16
_ATTEMPTS = 3
"""If other requests are under way, their images are counted too; another attempt may be alone."""
_COUNT_INTERVAL_SECONDS = 0.1
_RETRY = "if it is only slow, try again with a larger --timeout-seconds."
_SEE_READER = (
    f"see its log; both must use the same folder for embeddings, the same checkpoint and the same dtype; {_RETRY}"
)
_OTHER_FOLDER = "the two use different folders for embeddings: start both with the same --shared-storage-path."
_TOO_LATE = "not tried, because the pairs before it took too long"
_ADDRESSES = "check that the addresses are those of the instances,"

Deltas = dict[str, Counters]
"""What was added to the counters of instances, by their URLs."""


class _FailedError(Exception):
    """An image got no further; ``result`` says where."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.says)
        self.result = result


async def check_instances(client: Client, instances: Sequence[Observed]) -> AsyncIterator[Result]:
    """Send an image through each pair of instances, or if there are many, so that each instance is in one pair at least."""
    until = time.monotonic() + client.limits.pairs_messages * client.limits.message_seconds
    usable = [one for one in instances if one.health.role in ("", one.role)]
    of = {role: [one for one in usable if one.role == role] for role in Role}
    encoders = of[Role.ENCODER]
    for encoder, pd in pairs(encoders, of[Role.PD]):
        if time.monotonic() >= until:
            yield _EMBEDDING.skipped(f"{encoder.name} to {pd.name}: {_TOO_LATE}")
        else:
            for result in await _check_pair(client, encoder, pd):
                yield result
    for encoder, prefill, decode in chains(encoders, of[Role.PREFILL], of[Role.DECODE]):
        if time.monotonic() >= until:
            yield _KV.skipped(f"{encoder.name} to {prefill.name} to {decode.name}: {_TOO_LATE}")
        else:
            for result in await _check_pair(client, encoder, prefill, decode):
                yield result
    if not encoders:
        for prefill, decode in pairs(of[Role.PREFILL], of[Role.DECODE]):
            yield _KV.skipped(f"{prefill.name} to {decode.name}: there is no encoder for the image to be sent")
    if (of[Role.PD] or of[Role.PREFILL]) and not encoders:
        yield _EMBEDDING.skipped("no healthy encoder could send one")
    elif encoders and not (of[Role.PD] or (of[Role.PREFILL] and of[Role.DECODE])):
        yield _EMBEDDING.skipped("no healthy instance could read one")
    for one in of[Role.AGGREGATED]:
        yield await _check_aggregated(client, one)


def pairs(senders: Sequence[Observed], readers: Sequence[Observed]) -> list[tuple[Observed, Observed]]:
    """Return all pairs if there are few, otherwise pairs that contain each instance at least once."""
    if len(senders) * len(readers) <= MAX_PAIRS:
        return list(product(senders, readers))
    count = max(len(senders), len(readers))
    return [(senders[n % len(senders)], readers[n % len(readers)]) for n in range(count)]


def chains(
    encoders: Sequence[Observed], prefills: Sequence[Observed], decodes: Sequence[Observed]
) -> Iterator[tuple[Observed, Observed, Observed]]:
    """Yield ways of an image through one of each, in which all ``pairs`` of encoders and Ps, and of Ps and Ds, occur."""
    ways, further = pairs(encoders, prefills), pairs(prefills, decodes)
    for one in prefills:
        senders = [encoder for encoder, prefill in ways if prefill is one]
        readers = [decode for prefill, decode in further if prefill is one]
        for n in range(max(len(senders), len(readers)) if senders and readers else 0):
            yield senders[n % len(senders)], one, readers[n % len(readers)]


async def check_proxy(client: Client, proxy: ObservedProxy, instances: Sequence[Observed]) -> Result:
    """Send one request as a client does; ``instances`` are those known to be behind the proxy."""
    encoders = [one for one in instances if one.role == Role.ENCODER]
    readers = [one for one in instances if one.role in EMBEDDING_READERS]
    models = proxy.health.models
    if not models:
        return _THROUGH.skipped("it serves no model now")
    listed = {one.role for one in proxy.health.instances}
    if listed and listed.isdisjoint(_SEE_IMAGES) and not proxy.left_out:
        return _THROUGH.skipped("it has no instance that encodes images, so it was sent none")

    async def send() -> None:
        with _failing_as(
            _THROUGH,
            "a request with an image: the proxy",
            why="clients get the same answer.",
            do="fix the problems above first; the logs of the proxy and the instances say more.",
        ):
            await messages.ask_with_pixels(client, proxy.url, models[0])

    try:
        deltas = await _count(client, encoders, readers, send)
    except _FailedError as failed:
        return failed.result
    if not encoders or not readers:
        return _THROUGH.ok("a request with an image was answered")
    return _judge(_THROUGH, "a request with an image", encoders, readers, deltas)


def _advice(encoder: Observed, reader: Observed) -> str:
    """Return what to do if an embedding doesn't arrive."""
    place = encoder.health.ec_place
    if place is not None:
        return (
            f"its log says whether it reaches {place.host}:{place.port}, where the encoder keeps embeddings; on several "
            "machines give the encoder --ec-host and --ec-port, open that port, and give all the same --fleet-key-file."
        )
    return _OTHER_FOLDER if len({encoder.health.ec_store, reader.health.ec_store} - {""}) > 1 else _SEE_READER


async def _check_pair(
    client: Client, encoder: Observed, reader: Observed, decode: Observed | None = None
) -> list[Result]:
    """Send an image from ``encoder`` to ``reader``; a prefill instance passes the prompt's KV on to ``decode``."""
    outcomes = ("", "")

    async def send() -> None:
        nonlocal outcomes
        with _failing_as(
            _EMBEDDING,
            f"{encoder.name} was sent an image, and",
            why="no request with an image that is sent to this encoder can be answered.",
            do=f"see its log: the folder for embeddings may be full, missing or not writable; {_RETRY}",
        ):
            encoded = await messages.encode(client, encoder)
        with _failing_as(
            _EMBEDDING,
            f"{encoder.name} has published an embedding, and {reader.name}, asked about it,",
            why="PDs can't encode: every request with an image waits until its deadline and fails.",
            do=_advice(encoder, reader),
        ):
            await messages.tell_place(client, reader, encoder, encoded)
            if decode is None:
                outcomes = encoded.outcome, (await messages.ask(client, reader, encoded)).outcome
                return
            prefilled = await messages.prefill(client, reader, encoded)
            outcomes = encoded.outcome, prefilled.outcome
        with _failing_as(
            _KV,
            f"{reader.name} holds KV, and {decode.name}, which was sent its handle,",
            why="answers end after their first token.",
            do="decode must reach prefill at the address in the handle: give prefill --kv-host NAME (vLLM: "
            "VLLM_NIXL_SIDE_CHANNEL_HOST), a name by which decode finds it, and open that port between them.",
        ):
            await messages.ask(client, decode, encoded, prefilled.handle)

    try:
        deltas = await _count(client, [encoder], [reader], send, decode)
    except _FailedError as failed:
        return [failed.result]
    # The responses of the built-in engine say themselves whether the embedding has passed.
    is_confirmed = outcomes in (("encoded", "hit"), ("encoded", "waited"))
    way = f"{encoder.name} to {reader.name}"
    results = [_judge(_EMBEDDING, way, [encoder], [reader], deltas, is_confirmed)]
    return results if decode is None else [*results, _judge_kv(reader, decode, deltas[decode.url].kv_transfers)]


async def _check_aggregated(client: Client, instance: Observed) -> Result:
    try:
        with _failing_as(
            _IMAGES, instance.name, why="it should have answered a request with an image.", do=f"see its log; {_RETRY}"
        ):
            await messages.ask_with_pixels(client, instance.url, instance.health.model)
    except _FailedError as failed:
        return failed.result
    return _IMAGES.ok(f"{instance.name} answers a question about an image by itself")


@contextmanager
def _failing_as(check: Check, says: str, *, why: str, do: str) -> Iterator[None]:
    """Raise _FailedError instead of NoAnswerError, whose reason continues ``says``."""
    try:
        yield
    except NoAnswerError as error:
        raise _FailedError(check.problem(f"{says} {error}", why, do)) from None


async def _count(
    client: Client,
    encoders: Sequence[Observed],
    readers: Sequence[Observed],
    send: Callable[[], Awaitable[None]],
    decode: Observed | None = None,
) -> Deltas:
    """Return what ``send`` has added to the counters of these instances. Raises what ``send`` raises."""
    urls = [one.url for one in (*encoders, *readers, *([decode] if decode else []))]
    deltas: Deltas = {}
    for _ in range(_ATTEMPTS):
        before = await _read_all(client, urls)
        await send()
        until = time.monotonic() + client.limits.count_seconds
        while True:
            now = await _read_all(client, urls)
            deltas = {url: now[url].since(before[url]) for url in urls}
            # What isn't counted at all is not waited for.
            is_complete = _sum(encoders, deltas).encoded != 0 and _sum(readers, deltas).loaded != 0
            if (is_complete and (decode is None or deltas[decode.url].kv_transfers != 0)) or time.monotonic() > until:
                break
            await asyncio.sleep(_COUNT_INTERVAL_SECONDS)
        if (Counters.of_all(deltas.values()).encoded or 0) <= 1:
            break
    return deltas


async def _read_all(client: Client, urls: Sequence[str]) -> Deltas:
    return dict(zip(urls, await asyncio.gather(*(read_counters(client, url) for url in urls)), strict=True))


def _sum(instances: Sequence[Observed], deltas: Deltas) -> Counters:
    return Counters.of_all(deltas[one.url] for one in instances)


def _judge(
    check: Check,
    way: str,
    encoders: Sequence[Observed],
    readers: Sequence[Observed],
    deltas: Deltas,
    is_confirmed: bool = False,
) -> Result:
    """Return what the counters prove about one answered image; ``is_confirmed``: whether the responses say it too."""
    encoded, (encoded_again, loaded, _) = _sum(encoders, deltas).encoded, _sum(readers, deltas)
    if encoded_again:
        return check.problem(
            f"{way}: answered, but the images were encoded again where they should have been loaded ({encoded_again:g})",
            why="the encoders' work is done twice, so they gain nothing.",
            do="let the instance only read embeddings (ec_role ec_consumer), and send it no pixels.",
        )
    if encoded is None or loaded is None:
        silent = [name for name, count in (("encoder", encoded), ("reader", loaded)) if count is None]
        return check.warning(
            f"{way}: answered, but unproven: the {' and the '.join(silent)} counts no embeddings",
            why="an answer alone doesn't show that nothing was encoded twice.",
            do="make /metrics of all instances readable from here; vLLM counts embeddings with chiasm's connector, "
            "but not with --disable-log-stats.",
        )
    if encoded == 0:
        return check.problem(
            f"{way}: answered, but no encoder has encoded the image",
            why="the image is new, so the answer can't be about it.",
            do=f"{_ADDRESSES} and that nothing between them answers from a cache.",
        )
    if loaded == 0:
        return check.problem(
            f"{way}: answered, but the embedding was not loaded",
            why="the answer can't be about the image that was sent.",
            do=f"{_ADDRESSES} and that all run the same version of chiasm.",
        )
    if encoded > 1 and not is_confirmed:
        return check.warning(
            f"{way}: answered, but unproven: {encoded:g} images were encoded meanwhile, although one was sent",
            why="the images of other requests are counted too.",
            do="try again when the deployment has little to do.",
        )
    if encoded > 1:
        says = f"encoded, loaded, not encoded again, as both answers say ({encoded:g} images were counted meanwhile)"
        return check.ok(f"{way}: {says}")
    return check.ok(f"{way}: encoded once, loaded, not encoded again")


def _judge_kv(prefill: Observed, decode: Observed, transfers: float | None) -> Result:
    way = f"{prefill.name} to {decode.name}"
    if transfers is None and decode.is_vllm:
        return _KV.warning(
            f"{way}: answered, but unproven: the decode instance counts no transfers",
            why="vLLM's decode instances may compute a prompt themselves.",
            do="make /metrics of the decode instance readable from here.",
        )
    if transfers == 0:
        return _KV.problem(
            f"{way}: answered, but no KV was fetched",
            why="the decode instance has computed the prompt itself, which it is meant to be spared.",
            do="start prefill as kv_producer and decode as kv_consumer, with the same KV connector; their logs say more.",
        )
    proof = "" if transfers is not None else " (it answered about an image, for which it needs prefill's KV)"
    return _KV.ok(f"{way}: KV was fetched{proof}")
