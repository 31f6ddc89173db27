"""Whether an embedding really travels: an image that no cache can have is sent, and counters prove who did what for it.

Chosen by load, as a proxy chooses, most pairs of instances would go untested. So the messages of a proxy are sent to the
instances themselves, to each pair where they are few.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from chiasm.doctor import wire
from chiasm.doctor.base import Check, Finding
from chiasm.doctor.client import Client, NoAnswerError
from chiasm.doctor.counters import Counters, read_counters
from chiasm.doctor.instances import Instance, Proxy

_EMBEDDING = Check("embedding travels")
_KV = Check("KV travels")
_THROUGH = Check("through the proxy")
_ENCODES = Check("images")

MOST_PAIRS = 16
_ATTEMPTS = 3
"""While other requests are under way their images are counted too; then another try may be alone."""
_COUNT_SECONDS = 3.0
"""In which an instance must have counted what it has done."""
_COUNT_INTERVAL_SECONDS = 0.1
_WHY = "PDs cannot encode: every request with an image waits for its deadline and fails."

_Result = TypeVar("_Result")
Sent = Callable[[], Awaitable[None]]
Deltas = Mapping[str, Counters]


class BrokenError(Exception):
    """A journey ended on its way; ``finding`` says where."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.says)
        self.finding = finding


class Travel:
    """Sends images, one after the other, so that each is counted alone."""

    def __init__(self, client: Client, timeout_seconds: float) -> None:
        """``timeout_seconds`` is for each message."""
        self._client = client
        self._timeout_seconds = timeout_seconds

    # ---- E to PD, and E to P to D ----------------------------------------------------------------------------------------

    async def embedding(self, encoder: Instance, reader: Instance) -> Finding:
        """From ``encoder`` to ``reader``, a pd."""
        way = f"{encoder.name} to {reader.name}"

        told = False

        async def send() -> None:
            nonlocal told
            image, encoded = await self._encoded(encoder)
            answer = await self._read(encoder, reader, wire.ask_about(*self._message(reader, image, encoded.metadata)))
            told = _tell(encoded.outcome, answer.outcome)

        try:
            deltas = await self._counted((encoder, reader), send, lambda found: _has_travelled(found, encoder, reader))
        except BrokenError as broken:
            return broken.finding
        return _judged(_EMBEDDING, way, [deltas[encoder.url]], [deltas[reader.url]], told)

    async def handover(self, encoder: Instance | None, prefill: Instance, decode: Instance) -> list[Finding]:
        """An image from ``encoder`` to ``prefill``, and the prompt's KV from there to ``decode``."""
        if encoder is None:
            return [_KV.skipped(f"{prefill.name} to {decode.name}: there is no encoder for the image that is sent")]
        source = encoder
        told = False

        async def send() -> None:
            nonlocal told
            image, encoded = await self._encoded(source)
            message = self._message(prefill, image, encoded.metadata)
            left = await self._read(source, prefill, wire.prefill(*message))
            told = _tell(encoded.outcome, left.outcome)
            try:
                await wire.ask_about(*self._message(decode, image, encoded.metadata), left.handle)
            except NoAnswerError as error:
                raise BrokenError(_kv_problem(prefill, decode, str(error))) from None

        def settled(found: Deltas) -> bool:
            return _has_travelled(found, source, prefill) and found[decode.url].kv_transfers != 0

        try:
            deltas = await self._counted((source, prefill, decode), send, settled)
        except BrokenError as broken:
            return [broken.finding]
        return [
            _judged(_EMBEDDING, f"{source.name} to {prefill.name}", [deltas[source.url]], [deltas[prefill.url]], told),
            _judged_kv(prefill, decode, deltas[decode.url].kv_transfers),
        ]

    async def encodes(self, instance: Instance) -> Finding:
        """An aggregated instance, which does it all."""
        image = wire.fresh_image()
        try:
            await wire.ask_proxy_about(self._client, instance.url, instance.model, image, self._timeout_seconds)
        except NoAnswerError as error:
            return _ENCODES.problem(
                f"{instance.name} {error}",
                why="a request with an image should have been answered.",
                do="its log says more; try again with a greater --timeout-seconds if it is only slow.",
            )
        return _ENCODES.ok(f"{instance.name} answers about an image by itself")

    # ---- through the proxy -----------------------------------------------------------------------------------------------

    async def through(self, proxy: Proxy, fleet: Sequence[Instance]) -> Finding:
        """One request as a client sends it; ``fleet`` is what is known to stand behind the proxy."""
        encoders = [one for one in fleet if one.role == "encoder"]
        readers = [one for one in fleet if one.role in ("pd", "prefill")]
        if not proxy.models:
            return _THROUGH.skipped("it serves no model now")

        async def send() -> None:
            image = wire.fresh_image()
            try:
                await wire.ask_proxy_about(self._client, proxy.url, proxy.models[0], image, self._timeout_seconds)
            except NoAnswerError as error:
                finding = _THROUGH.problem(
                    f"a request with an image: it {error}",
                    why="this is what clients get.",
                    do="see to the problems above first; the proxy's log and those of the instances say more.",
                )
                raise BrokenError(finding) from None

        def settled(found: Deltas) -> bool:
            encoded = _sum(found[one.url].encoded for one in encoders)
            loaded = _sum(found[one.url].loaded for one in readers)
            return encoded != 0 and loaded != 0

        try:
            deltas = await self._counted([*encoders, *readers], send, settled)
        except BrokenError as broken:
            return broken.finding
        if not encoders or not readers:
            return _THROUGH.ok("a request with an image was answered")
        makers, takers = [deltas[one.url] for one in encoders], [deltas[one.url] for one in readers]
        return _judged(_THROUGH, "a request with an image", makers, takers)

    # ---- steps -----------------------------------------------------------------------------------------------------------

    def _message(
        self, instance: Instance, image: wire.ImageFile, metadata: dict[str, Any]
    ) -> tuple[Client, Instance, wire.ImageFile, dict[str, Any], float]:
        return self._client, instance, image, metadata, self._timeout_seconds

    async def _encoded(self, encoder: Instance) -> tuple[wire.ImageFile, wire.Encoded]:
        image = wire.fresh_image(encoder.fingerprint)
        try:
            return image, await wire.encode(self._client, encoder, image, self._timeout_seconds)
        except NoAnswerError as error:
            raise BrokenError(
                _EMBEDDING.problem(
                    f"{encoder.name} was sent an image, and {error}",
                    why="no request with an image that comes to this encoder can be answered.",
                    do="its log says more: a folder for embeddings that is full, gone or not writable shows there; if it is "
                    "only slow, try again with a greater --timeout-seconds.",
                )
            ) from None

    async def _read(self, encoder: Instance, reader: Instance, asking: Awaitable[_Result]) -> _Result:
        try:
            return await asking
        except NoAnswerError as error:
            apart = bool(encoder.ec_store and reader.ec_store and encoder.ec_store != reader.ec_store)
            raise BrokenError(
                _EMBEDDING.problem(
                    f"{encoder.name} has published an embedding, and {reader.name}, asked about it, {error}",
                    why=_WHY,
                    do="the two use different folders for embeddings: start both with the same --shared-storage-path."
                    if apart
                    else "its log says whether it waited for the embedding; both must use the same folder for embeddings, the "
                    "same checkpoint and the same dtype. If it is only slow, try again with a greater --timeout-seconds.",
                )
            ) from None

    async def _counted(
        self, instances: Sequence[Instance], send: Sent, settled: Callable[[Deltas], bool]
    ) -> dict[str, Counters]:
        """What ``send`` has added to the counters of ``instances``, by their URLs."""
        deltas: dict[str, Counters] = {}
        for _ in range(_ATTEMPTS):
            before = await self._counters(instances)
            await send()
            until = time.monotonic() + _COUNT_SECONDS
            while True:
                now = await self._counters(instances)
                deltas = {url: now[url].since(before[url]) for url in now}
                if settled(deltas) or time.monotonic() > until:
                    break
                await asyncio.sleep(_COUNT_INTERVAL_SECONDS)
            if (_sum(found.encoded for found in deltas.values()) or 0) <= 1:
                break
        return deltas

    async def _counters(self, instances: Sequence[Instance]) -> dict[str, Counters]:
        found = await asyncio.gather(*(read_counters(self._client, one.url) for one in instances))
        return {one.url: counters for one, counters in zip(instances, found, strict=True)}


def pairs(encoders: Sequence[Instance], readers: Sequence[Instance]) -> list[tuple[Instance, Instance]]:
    """Each with each, where those are few; else so that each is in one pair at least."""
    if len(encoders) * len(readers) <= MOST_PAIRS:
        return [(encoder, reader) for encoder in encoders for reader in readers]
    if not encoders or not readers:
        return []
    count = max(len(encoders), len(readers))
    return [(encoders[n % len(encoders)], readers[n % len(readers)]) for n in range(count)]


def _has_travelled(found: Deltas, encoder: Instance, reader: Instance) -> bool:
    """Whether nothing more is to be counted: what isn't counted at all is not waited for."""
    return found[encoder.url].encoded != 0 and found[reader.url].loaded != 0


def _tell(of_encoder: str, of_reader: str) -> bool:
    """Whether both answers themselves say that the image has travelled; those of the built-in engine do."""
    return of_encoder == "encoded" and of_reader in ("hit", "waited")


def _judged(
    check: Check, way: str, encoders: Sequence[Counters], readers: Sequence[Counters], told: bool = False
) -> Finding:
    """What the counters say of one image that was asked about and answered; ``told``: whether the answers say it too."""
    encoded, loaded = _sum(one.encoded for one in encoders), _sum(one.loaded for one in readers)
    encoded_again = _sum(one.encoded for one in readers)
    if encoded_again:
        return check.problem(
            f"{way}: answered, but the images were encoded again where they should have been read ({encoded_again:g})",
            why="the encoders' work is done twice, and nothing is won by having them.",
            do="have the instance read embeddings only (ec_role ec_consumer), and send it no pixels.",
        )
    if encoded is None or loaded is None:
        whose = [name for name, told in (("encoder", encoded), ("reader", loaded)) if told is None]
        return check.warning(
            f"{way}: answered, but unproven: the {' and the '.join(whose)} counts no embeddings",
            why="an answer alone doesn't show that nothing was encoded twice.",
            do="let /metrics of all instances be read from here; vLLM counts embeddings with chiasm's connector, unless it is "
            "started with --disable-log-stats.",
        )
    if encoded == 0:
        return check.problem(
            f"{way}: answered, but no encoder has encoded the image",
            why="nobody has seen this image before, so that the answer cannot be about it.",
            do="look whether the instances' addresses are theirs, and nothing between them answers from a cache.",
        )
    if loaded == 0:
        return check.problem(
            f"{way}: answered, but the embedding was not loaded",
            why="the answer cannot be about the image that was sent.",
            do="look whether the instances' addresses are theirs, and all run the same version of chiasm.",
        )
    if encoded > 1 and told:
        return check.ok(
            f"{way}: encoded, loaded, not encoded again, as both answers say ({encoded:g} images were counted meanwhile)"
        )
    if encoded > 1:
        return check.warning(
            f"{way}: answered, but unproven: {encoded:g} images were encoded meanwhile, where one was sent",
            why="requests of others are counted as well.",
            do="ask again when the deployment has little to do.",
        )
    return check.ok(f"{way}: encoded once, loaded, not encoded again")


def _judged_kv(prefill: Instance, decode: Instance, transfers: float | None) -> Finding:
    way = f"{prefill.name} to {decode.name}"
    if transfers is None and decode.is_vllm:
        return _KV.warning(
            f"{way}: answered, but unproven: the decode instance counts no transfers",
            why="a decode instance of vLLM may compute a prompt itself.",
            do="let /metrics of the decode instance be read from here.",
        )
    if transfers == 0:
        return _KV.problem(
            f"{way}: answered, but no KV was fetched",
            why="the decode instance has computed the prompt itself, which it is there to be spared.",
            do="start prefill as kv_producer and decode as kv_consumer, with the same KV connector; their logs say more.",
        )
    counted = "" if transfers is not None else " (it answered about an image, for which it needs prefill's KV)"
    return _KV.ok(f"{way}: KV was fetched{counted}")


def _kv_problem(prefill: Instance, decode: Instance, trouble: str) -> Finding:
    return _KV.problem(
        f"{prefill.name} has left KV, and {decode.name}, sent its handle, {trouble}",
        why="no answer gets further than its first token.",
        do="decode must reach prefill where the handle says: give prefill --kv-host NAME (vLLM: "
        "VLLM_NIXL_SIDE_CHANNEL_HOST) under which decode finds it, and open that port between them.",
    )


def _sum(counts: Iterable[float | None]) -> float | None:
    """None if one of them isn't known."""
    total = 0.0
    for count in counts:
        if count is None:
            return None
        total += count
    return total
