"""The messages that cross between processes: one type for each, used by the process that writes it and the one that reads it.

Versions mix while a fleet is updated, so every field has a default: a reader ignores fields that it doesn't know and takes
the default for fields that the writer doesn't know. Names that start with ``kv_`` or ``ec_`` and the first group of fields
of :class:`KVTransferParams` are vLLM's.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from msgspec import UNSET, Raw, UnsetType

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What a decoder of msgspec raises for bytes that are not the message that it expects."""
UNREADABLE_YAML = (*UNREADABLE, ValueError)
"""The same for YAML, in which a date that there isn't is a ValueError."""

Integer = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
"""An integer that every language can hold; JSON's may have any number of digits."""
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 53) - 1)]
"""A number of things. Up to here JavaScript represents every integer."""
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Factor = Annotated[float, msgspec.Meta(ge=0, le=1e3)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Port = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
Identifier = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""Names the embedding of an item."""

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"
MESSAGES_PATH = "/v1/messages"
COUNT_TOKENS_PATH = "/v1/messages/count_tokens"
NAMED_EVENT_PATHS = (RESPONSES_PATH, MESSAGES_PATH)
"""Those in whose streams each event has a name; clients of messages skip events without one."""
IMAGE_PATHS = (RESPONSES_PATH, MESSAGES_PATH, COUNT_TOKENS_PATH)
"""Besides that of chats, those at which an instance may take images by the names of their embeddings."""
OTHER_PATHS = (
    *IMAGE_PATHS,
    *("/v1/embeddings", "/v2/embed", "/pooling", "/classify"),
    *("/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank"),
    *("/tokenize", "/detokenize"),
    *("/v1/chat/completions/batch", "/generative_scoring"),
)
"""What vLLM answers besides, depending on the model: POST of JSON. Nothing by which an instance is operated or debugged."""
AWAITED_PATH = "/embeddings/awaited"
LOST_PATH = "/embeddings/lost"
PLACES_PATH = "/embeddings/places"
CLIENT_HEADER = "x-chiasm-client"
"""With it the proxy, if it checks API keys, tells an instance which of them a request has; it names the key, and isn't it."""
WORKER_HEADER = "x-chiasm-worker"
"""From whom the worker of a proxy has a request that it passes on to another one; empty if it asks for itself."""
FLEET_HEADER = "x-chiasm-fleet"
"""The signature of a call that only processes of the fleet may make (:mod:`chiasm.http.fleet_calls`)."""
KV_RELEASE_PATH = "/v1/kv/release"
"""Below /v1, so that it needs an API key where answers need one."""
INSTANCES_PATH = "/instances"
LEASE_PATH = "/fleet/lease"
"""Where instances join a proxy, and renew their leases."""
MEMBERS_PATH = "/fleet/members"
"""Where the workers of one proxy, and nobody else, ask each other for :class:`Members`."""
DRAIN_PATH = "/drain"
LEASE_SECONDS = 10.0
"""After so long without a renewal, a proxy gives an instance no new work."""
RENEW_SECONDS = 3.0
DRAINING = "draining"
"""The status of an instance that takes no new work, and ends when nothing is left to do."""


class Role(enum.StrEnum):
    """What an instance does."""

    ENCODER = "encoder"
    PD = "pd"
    AGGREGATED = "aggregated"
    PREFILL = "prefill"
    DECODE = "decode"


# ---- health ------------------------------------------------------------------------------------------------------------


class ImageCost(msgspec.Struct, kw_only=True, frozen=True):
    """What an image of one size costs an instance, of a CPU on one core."""

    pixels: Count = 0
    """Width times height of the image as a client sends it."""
    tokens: Count = 0
    """Tokens that the image takes in a prompt."""
    encode_seconds: Seconds = 0.0
    """Decoding the file, preprocessing and the vision tower; 0 if the instance encodes no images."""


class Costs(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What work costs an instance, of a CPU on one core, as it measured at start. 0 and empty mean unknown."""

    prefill_seconds_per_token: Seconds = 0.0
    decode_step_seconds: Seconds = 0.0
    """A step that generates one token of one sequence."""
    beside_streams: Factor = 0.0
    """By what factor prefill takes longer while the instance decodes."""
    images: list[ImageCost] = []
    """In ascending order of pixels."""


class ECPlace(msgspec.Struct, kw_only=True, frozen=True):
    """Where an encoder serves embeddings from its memory."""

    host: Name = ""
    port: Port = 0
    engine_id: Name = ""
    """Drawn by the encoder at each start, so that nothing is taken from one that was restarted in its place."""

    def __bool__(self) -> bool:
        """Whether it names a place."""
        return bool(self.host and self.port and self.engine_id)


class Load(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What an instance has to do, and what it has room for, whoever gave it the work."""

    outstanding_seconds: Seconds = 0.0
    """Estimated seconds of the work that it has not done yet, of a CPU on one core; without the rest of answers, whose length
    nobody knows."""
    requests: Count = 0
    """Requests under way."""
    kv_blocks_free: Count | None = None
    """None if it has no KV blocks."""
    free_bytes: Count | None = None
    """Room for embeddings, in bytes, before any that is kept has to go; None if it doesn't say."""


class Health(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What an instance answers to GET /health. Fields with their default are left out, except for ``status``; while the model
    loads, nothing else is set but the incarnation, the clock and how far it is."""

    status: str = msgspec.field(default_factory=lambda: "ok")  # msgspec omits no field that has a factory
    """``ok``, ``starting``, ``failed`` or ``draining``. Versions before 0.4 say ``stopping`` when they drain."""
    incarnation: Name = ""
    """Names the process, by a random word of its own. Two URLs with the same one lead to the same process."""
    message: str = ""
    """Why the status isn't ``ok``, or what else is wrong."""
    loaded_tensors: int = 0
    tensors: int = 0
    """While the model loads: tensors that it has, and tensors of all parts that have begun to load; 0 before that."""
    role: str = ""
    """A :class:`Role`; empty if the instance doesn't say (vLLM without chiasm's middleware)."""
    model: str = ""
    """The name by which requests ask for the model."""
    fingerprint: str = ""
    """Hex; names model, processor settings and dtype."""
    dtype: str = ""
    ec_store: str = ""
    """Names the store through which embeddings are exchanged; empty if the instance exchanges none."""
    ec_connector: Name = ""
    """What moves embeddings from encoders to language models; empty if the instance exchanges none, or doesn't say."""
    ec_faults: Count = 0
    """Errors that its EC connector has raised where it shouldn't."""
    reads_stored: bool = False
    """Whether it reads embeddings that the fleet's shared cache has."""
    tells_lost: bool = False
    """Whether it takes questions at LOST_PATH."""
    ec_place: ECPlace | None = None
    """Of an encoder: where its embeddings are. None if they are found without."""
    version: str = ""
    """Version of chiasm."""
    engine: str = ""
    """Name and version of an engine that isn't chiasm's own, such as ``vllm 0.32.0``."""
    fleet_keys: Annotated[list[str], msgspec.Meta(max_length=64)] = []
    """Names of the fleet keys that it accepts (:attr:`chiasm.fleet_key.FleetKey.names`); empty if it has none."""
    clock_milliseconds: Count | None = None
    """Unix time on its clock, by which calls to it are signed; None if it has no fleet key."""
    needs_key: bool = False
    """Whether requests need an API key, which the proxy passes on."""
    takes_image_size: bool = True
    """Whether ``image_size`` sizes placeholders for it; otherwise it needs the metadata of the encoder's answer."""
    image_paths: list[Name] = []
    """Those of ``IMAGE_PATHS`` at which it takes the content parts by which images of chats are named."""
    max_model_len: Count | None = None
    """Tokens of prompt and answer together."""
    longest_token: Count | None = None
    """Characters of the longest token: a text has at least its characters divided by this in tokens. None if it doesn't say."""
    max_items: Count | None = None
    """Images that one request may have."""
    max_body_bytes: Count | None = None
    """The largest request that it takes."""
    max_num_seqs: Count | None = None
    """Sequences that it computes at the same time."""
    kv_connector: str | None = None
    """What moves KV from prefill to decode; None if the instance moves none."""
    kv_blocks_total: Count | None = None
    kv_blocks_free: Count | None = None
    device: str = ""
    """``cpu`` or ``cuda:0``; of vLLM with all devices that it may use, ``cuda:0,1``."""
    threads: Count | None = None
    """Intra-op CPU threads."""
    cpus: list[Count] = []
    """CPUs that it may run on."""
    shares_cores: bool = False
    """Whether it leaves cores to the instances of its machine that compute at the same time."""
    device_id: str = ""
    """Names the device among all machines, such as ``host/cpu:0-3`` or ``host/GPU-…``; instances with the same one share it."""
    costs: Costs | None = None
    """None if it has not measured them."""
    load: Load | None = None
    """None if it doesn't say."""


class InstanceState(enum.StrEnum):
    """How the proxy judges an instance. Only a healthy one gets new work."""

    STARTING = "starting"
    """Added, and not healthy yet."""
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    """The last probe or connection failed; a probe that succeeds brings it back."""
    MISMATCHED = "mismatched"
    """It answers, but serves another role, model, fingerprint, store or KV connector than the rest of the fleet."""
    DRAINING = "draining"
    """It gets no new work, and goes when its last call has ended: it is being removed, or says that it ends."""


class InstanceInfo(msgspec.Struct, kw_only=True, frozen=True):
    """One instance in the proxy's /health and /instances."""

    url: str = ""
    role: str = ""
    state: str = ""
    """An :class:`InstanceState`."""
    reason: str | None = None
    """Why it isn't healthy."""
    model: str | None = None
    version: str | None = None
    engine: str | None = None
    outstanding_work: float = 0.0
    in_flight: int = 0
    """Calls under way."""
    number: int | UnsetType = UNSET
    """What the proxy's ``Server-Timing`` calls it."""
    costs: Costs | UnsetType = UNSET
    """What work costs it, as the proxy has learned."""
    sources: list[str] | UnsetType = UNSET
    """What says that it belongs to the fleet: ``options``, ``admin``, ``lease``, or an argument of ``--discover``."""
    load: Load | UnsetType = UNSET
    """What it last said, in its health or with its lease."""


class InstanceList(msgspec.Struct, kw_only=True, frozen=True):
    """Answer of the proxy's GET /instances."""

    instances: list[InstanceInfo] = []


class ProxyHealth(InstanceList, kw_only=True, frozen=True):
    """Answer of the proxy's GET /health."""

    status: str = ""
    """``ok`` if text can be answered, ``stopping`` while the proxy shuts down, otherwise ``unavailable``."""
    models: list[str] = []


# ---- membership --------------------------------------------------------------------------------------------------------


class Lease(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Body of POST LEASE_PATH, from an instance to each proxy: it is here, and stays for LEASE_SECONDS.

    The proxy believes it if what answers at the URL says that it is the same incarnation.
    """

    url: Annotated[str, msgspec.Meta(max_length=2048)] = ""
    """Base URL at which the proxy reaches it."""
    role: Name = ""
    """A :class:`Role`."""
    incarnation: Name = ""
    status: Name = ""
    """As in :class:`Health`."""
    leaves: bool = False
    """Whether it is about to end and needs no lease any more."""
    waits: bool = False
    """Whether the answer may come after RENEW_SECONDS, or with the next news: so each side notices when the other goes."""
    load: Load = Load()


class LeaseAnswer(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What a proxy answers to a lease; to GET LEASE_PATH, without ``state`` and ``reason``."""

    lease_seconds: Seconds = LEASE_SECONDS
    state: Name = ""
    """The :class:`InstanceState` of the instance at this proxy."""
    reason: str | None = None
    """Why it isn't healthy."""
    fleet_keys: Annotated[list[str], msgspec.Meta(max_length=64)] = []
    """As in :class:`Health`."""
    clock_milliseconds: Count = 0
    """Unix time on the proxy's clock, by which leases are signed."""


class AddedInstance(msgspec.Struct, kw_only=True, frozen=True):
    """An instance that an administrator has added to a proxy."""

    url: str = ""
    role: str = ""
    """A :class:`Role`."""


class HeldLease(msgspec.Struct, kw_only=True, frozen=True):
    """A lease as the proxy has it that granted it."""

    lease: Lease = Lease()
    age_seconds: Seconds = 0.0
    """Since it was renewed."""


class Members(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Answer to GET MEMBERS_PATH: what a worker of a proxy knows that one which is started again would learn late or never."""

    added: list[AddedInstance] = []
    overruled: dict[str, list[str]] = {}
    """By source: URLs that an administrator has removed, although the source lists them."""
    dismissed: dict[str, str] = {}
    """By URL: the incarnation that an administrator has removed, so that it gets no lease."""
    leases: list[HeldLease] = []


class DrainOrder(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Body of POST DRAIN_PATH. An instance drains then, and a proxy has the instance at ``url`` do so."""

    url: Annotated[str, msgspec.Meta(max_length=2048)] = ""
    """Only to a proxy: the instance's."""


class DrainState(msgspec.Struct, kw_only=True, frozen=True):
    """Answer to POST DRAIN_PATH, with status 202."""

    incarnation: Name = ""
    """Of the process that drains: when another one answers at its URL, or nobody, it has ended."""
    requests: Count = 0
    """Requests that it still answers."""
    kv: Count = 0
    """Requests whose KV a decode instance has yet to fetch."""
    embeddings: Count = 0
    """Embeddings that a language instance has yet to fetch, or that are being written to the shared cache."""


# ---- models ------------------------------------------------------------------------------------------------------------


class ModelPermission(msgspec.Struct, kw_only=True, frozen=True):
    """What clients may do with a model, as vLLM and older versions of the OpenAI API say it."""

    id: str = ""
    object: str = "model_permission"
    created: int = 0
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelCard(msgspec.Struct, kw_only=True, frozen=True):
    """One model in the answer to GET /v1/models; its fields are vLLM's."""

    id: str = ""
    """The name by which requests ask for it."""
    object: str = "model"
    created: int = 0
    owned_by: str = "chiasm"
    root: str | None = None
    parent: str | None = None
    max_model_len: Count | None = None
    permission: list[ModelPermission] = []


class ModelList(msgspec.Struct, kw_only=True, frozen=True):
    """Answer to GET /v1/models."""

    object: str = "list"
    data: list[ModelCard] = []


def model_card(name: str, *, created: int, max_model_len: int | None) -> ModelCard:
    """Return the card of a model that is served since ``created``, in seconds since 1970."""
    permission = ModelPermission(id=f"modelperm-{created:x}", created=created)
    return ModelCard(id=name, created=created, root=name, max_model_len=max_model_len, permission=[permission])


# ---- embeddings --------------------------------------------------------------------------------------------------------


class ECItem(msgspec.Struct, kw_only=True, frozen=True):
    """One published embedding in an encoder's answer: the values of ``ec_transfer_params``, whose keys are identifiers."""

    item_indices: list[Count] = []
    """The places of the item among the images of the request, counted from 0."""
    metadata: Raw = Raw(b"{}")
    """A JSON object that sizes the item's placeholders (``image_grid_thw`` in the Qwen families)."""


class AwaitedEmbeddings(msgspec.Struct, kw_only=True, frozen=True):
    """What an instance that reads embeddings answers to GET AWAITED_PATH, at the time of the question, and to LOST_PATH."""

    identifiers: list[str] = []
    """Embeddings that prompts need next and that are neither in the instance's memory nor in the store, each once."""


MAX_PUBLISHED = 1024


class LossQuestion(msgspec.Struct, kw_only=True, frozen=True):
    """Body of POST LOST_PATH, which is answered with AwaitedEmbeddings as soon as some of those named are awaited.

    It is answered with none when the time is over, when the asker asks again, and when the instance ends.
    """

    asker: Name = ""
    """Names who asks, by a random word of its own. Each has one question at a time."""
    published: Annotated[list[Identifier], msgspec.Meta(max_length=MAX_PUBLISHED)] = []
    """Embeddings that were published before the question."""
    seconds: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0.0
    """How long it may wait."""


MAX_PLACES = 1024


class EmbeddingPlaces(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Body of POST PLACES_PATH, to a PD or prefill instance, which answers 204 at once: where embeddings are, or will be.

    What it says about an identifier replaces what was said before. It may come before the request that needs the embeddings,
    after it, or without any.
    """

    places: Annotated[dict[Identifier, ECPlace], msgspec.Meta(max_length=MAX_PLACES)] = {}
    """Encoders that have the embeddings, or that have been asked to make them."""
    stored: Annotated[list[Identifier], msgspec.Meta(max_length=MAX_PLACES)] = []
    """Embeddings that the fleet's shared cache has."""


# ---- KV ----------------------------------------------------------------------------------------------------------------

MAX_BLOCKS = 1 << 20
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class TokenLogprob(msgspec.Struct, array_like=True, frozen=True):
    """Log probability of one token of an answer, and the likeliest candidates as (token id, log probability), best first."""

    logprob: float
    top: tuple[tuple[TokenId, float], ...]
    token_id: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)] = -1
    """-1 only on the wire: versions before 0.4 don't send it, so it is the last of the array."""


class KVTransferParams(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The field ``kv_transfer_params``: what travels between proxy, prefill and decode about a request's KV.

    To P: ``do_remote_decode``, with ``continues`` and what was generated already. From P, and to D: a *handle*, which says
    where the KV is. The first group of fields is vLLM's. The second is chiasm's own: it lets D continue from the token that
    P sampled, and lets another instance continue the answer when one fails. A message with the first group alone is
    understood as vLLM understands it.
    """

    do_remote_prefill: bool = False
    """To D: the prompt's KV lies at a P."""
    do_remote_decode: bool = False
    """To P: compute the prompt and one token, and hold the KV for the D that gets the handle."""
    remote_engine_id: Name | None = None
    remote_block_ids: Annotated[list[TokenId], msgspec.Meta(max_length=MAX_BLOCKS)] | None = None
    remote_host: Name | None = None
    remote_port: Port | None = None
    remote_request_id: Name | None = None
    tp_size: Integer = 1

    continues: bool = False
    """The sender relays the answer as part of one longer answer. P: the request's ``max_tokens`` and ``stream`` are the
    client's own, and no handle comes back if the first token ends the answer. D: tokens are announced in the stream."""
    num_tokens: Count = 0
    """Tokens, from the first of the prompt, whose keys and values are in ``remote_block_ids``."""
    digest: Name = ""
    """Hex; names those tokens and the items among them. D compares it with its own."""
    output_token_ids: list[TokenId] = msgspec.field(default_factory=list)
    """What was sampled so far, the prompt's continuation. Empty if D samples the first token itself."""
    output_logprobs: list[TokenLogprob] = msgspec.field(default_factory=list)
    """Log probabilities of those tokens, if the request asks for them; otherwise empty."""
    num_sent: Count = 0
    """How many of ``output_token_ids``, from the first, the client already has."""
    seed: Integer | None = None
    """Seed of the sampling: the request's own or the one that P drew."""
    created: Integer | None = None
    """Unix time at which the answer began."""
    cached_tokens: Count = 0
    """Prompt tokens that the first P found in its prefix cache."""
    lease: Name = ""
    """To P: a name that nobody else can guess, by which the sender gives the KV back if no D comes for it
    (:class:`KVRelease`), also when it never got P's handle. P puts it into no handle."""
    prompts: Annotated[list[KVTransferParams], msgspec.Meta(max_length=1024)] = msgspec.field(default_factory=list)
    """For a request with several prompts: one handle each, in order; all other fields are unset then."""

    def missing(self) -> list[str]:
        """Return the fields that a handle needs and that this one lacks: without them nobody finds the KV."""
        needed = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port", "remote_request_id")
        return [name for name in needed if not getattr(self, name)]


MAX_RELEASED = 1024


class KVRelease(msgspec.Struct, kw_only=True, frozen=True):
    """Body of POST KV_RELEASE_PATH, to P: nobody will come for the KV of these requests. P answers 204, whatever it holds."""

    leases: Annotated[list[Name], msgspec.Meta(max_length=MAX_RELEASED)] = []
    """Their ``lease`` in :class:`KVTransferParams`. What a D has claimed stays with D."""


# ---- comments in a stream ----------------------------------------------------------------------------------------------

TOKENS_COMMENT = "tokens"
"""Followed by the ids of the tokens whose text the next event carries: D to the proxy."""
KV_COMMENT = "kv_transfer_params"
"""Followed by a handle (JSON), which ends P's part of a stream: P to the proxy."""
TIMING_COMMENT = "server-timing"
"""Followed by a ``Server-Timing`` value, shortly before a stream ends: to the client."""


# ---- errors ------------------------------------------------------------------------------------------------------------


class ErrorDetail(msgspec.Struct, kw_only=True, frozen=True):
    """What went wrong. ``param`` names the field of the request that is to blame."""

    message: str = ""
    type: str = ""
    param: str | None = None
    code: str | Integer | None = None
    """chiasm's codes are in docs/errors.md; vLLM puts the HTTP status here."""


class ErrorBody(msgspec.Struct, kw_only=True, frozen=True):
    """Body of every answer that isn't 2xx, and of an error event in a stream."""

    error: ErrorDetail = ErrorDetail()
    type: str = "error"
    """By it, clients of Anthropic's API know an error. It stands last: who reads streams looks for ``error`` first."""
