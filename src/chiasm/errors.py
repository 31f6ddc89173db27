"""The errors that chiasm raises on purpose, and the codes by which clients can tell them apart.

A message is one or two sentences that say what is wrong and what to do about it. ``status`` is the HTTP status, ``kind`` is
``error.type`` in an OpenAI error body, and ``code`` is its ``error.code``. docs/errors.md lists them all. A configuration error
ends the process with exit code 2.
"""

from __future__ import annotations

import enum


class Code(enum.StrEnum):
    """``error.code``: one for each refusal that a client may want to distinguish from others of the same type."""

    # 400: the request
    INVALID_JSON = "invalid_json"
    """The body is not valid JSON, or is nested too deeply."""
    TOO_MANY_IMAGES = "too_many_images"
    """The request has more images than the limit."""
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    """The prompt doesn't leave room for an answer in the model's context."""
    INVALID_ENCODING = "invalid_encoding"
    """The body cannot be decompressed as its ``Content-Encoding`` says."""
    INVALID_UUID = "invalid_uuid"
    """The ``uuid`` of an image cannot name an embedding."""
    INVALID_GRAMMAR = "invalid_grammar"
    """A schema, a pattern or a grammar for the answer is malformed, impossible or too complex."""
    GRAMMAR_TOO_EXPENSIVE = "grammar_too_expensive"
    """Compiling a schema, a pattern or a grammar takes too much time or memory."""
    # 400: media
    INVALID_URL = "invalid_url"
    """A media URL is malformed, or its scheme is not supported."""
    INVALID_BASE64 = "invalid_base64"
    """A ``data:`` URL doesn't hold valid base64."""
    INVALID_IMAGE = "invalid_image"
    """The file is not an image that can be decoded."""
    IMAGE_TOO_LARGE = "image_too_large"
    """The image has more pixels than the limit."""
    IMAGE_TOO_EXPENSIVE = "image_too_expensive"
    """Decoding the image takes longer than its size warrants."""
    MEDIA_TOO_LARGE = "media_too_large"
    """The image file is larger than the limit."""
    MEDIA_ADDRESS_NOT_ALLOWED = "media_address_not_allowed"
    """The URL leads to an address that is not public."""
    MEDIA_DOMAIN_NOT_ALLOWED = "media_domain_not_allowed"
    """The URL names a host that the operator does not allow."""
    MEDIA_PATH_NOT_ALLOWED = "media_path_not_allowed"
    """The ``file:`` URL leads outside the folder that the operator allows."""
    MEDIA_TIMEOUT = "media_timeout"
    """The URL did not deliver the image in time."""
    MEDIA_UNREACHABLE = "media_unreachable"
    """The URL could not be fetched."""
    MEDIA_CERTIFICATE_INVALID = "media_certificate_invalid"
    """The https site that the URL names could not prove who it is."""
    EMBEDDING_TOO_LARGE = "embedding_too_large"
    """The embedding of an image is larger than the store, or than what the language model's instance can take."""
    MEDIA_NOT_SUPPORTED = "media_not_supported"
    """This path takes no such media, or no instance could encode them there."""
    NOT_KEPT_APART = "not_kept_apart"
    """The request has a salt or a tenant, and what an instance would keep of it on this path would be shared with others."""
    # 401
    INVALID_API_KEY = "invalid_api_key"
    """The API key is missing or wrong."""
    # 403
    FLEET_KEY_NEEDED = "fleet_key_needed"
    """The request asks for what only the processes of the fleet may have, and isn't signed with the fleet key."""
    FLEET_SIGNATURE_INVALID = "fleet_signature_invalid"
    """The request is signed with another fleet key, or the signature is for another request, too old, or used before."""
    ORIGIN_NOT_ALLOWED = "origin_not_allowed"
    """A web page of another site asks a server that is for its own machine."""
    # 404
    MODEL_NOT_FOUND = "model_not_found"
    """The request names a model that is not served."""
    # 413
    BODY_TOO_LARGE = "body_too_large"
    """The request's body is larger than the limit."""
    REQUEST_TOO_LARGE = "request_too_large"
    """The request, with its images, needs more memory than one request may take."""
    # 415
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    """The body's ``Content-Type`` isn't JSON."""
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    """The body's ``Content-Encoding`` isn't supported."""
    # 429
    RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
    """The API key has as many requests in flight, or has sent as many within a minute, as it may."""
    # 501
    NOT_SERVED = "not_served"
    """The engine of the instances has nothing under this path."""
    # 502
    INSTANCE_LOST = "instance_lost"
    """An instance was lost before its answer was complete."""
    # 503
    TOO_MANY_REQUESTS = "too_many_requests"
    """A queue or a buffer is full."""
    NO_ENCODER = "no_encoder"
    """No encoder is healthy."""
    NO_PD = "no_pd"
    """No PD or aggregated instance is healthy."""
    NO_PREFILL = "no_prefill"
    """No prefill instance is healthy."""
    NO_DECODE = "no_decode"
    """No decode instance is healthy."""
    ENCODER_LOST = "encoder_lost"
    """The encoders that were tried failed, and no other is left or came back in time."""
    EMBEDDING_LOST = "embedding_lost"
    """The embedding of an image was lost again and again before it was read, or was needed again when its image was freed."""
    DISK_FULL = "disk_full"
    """The disk that holds the embeddings is full."""
    KV_UNAVAILABLE = "kv_unavailable"
    """The KV of the prompt is lost; the prompt must be prefilled again."""
    PREEMPTED = "preempted"
    """A decode instance ran out of KV blocks and of memory to set KV aside, and cannot recompute the prompt."""
    STARTING = "starting"
    """The instance is loading its model."""
    STOPPING = "stopping"
    """The instance or the proxy is shutting down."""
    FAILED = "failed"
    """The engine of the instance has failed."""
    # 504
    DEADLINE_EXCEEDED = "deadline_exceeded"
    """The request's deadline passed."""


class ChiasmError(Exception):
    """Base of all errors that chiasm raises on purpose. ``str(error)`` may be shown to a client."""

    status = 500
    kind = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, limit: str | None = None
    ) -> None:
        """``code`` is a :class:`Code`, or the code of another server whose error is passed on. ``limit`` names the limit that
        the request has reached (docs/limits.md), under which the refusal is counted."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.limit = limit


class ConfigurationError(ChiasmError):
    """The configuration cannot work (a missing model, a port in use, not enough memory)."""


class UnreadableError(ConfigurationError):
    """A file of the configuration cannot be read, for a reason that may pass (a full table of open files, a lost share)."""


class UnsupportedModelError(ConfigurationError):
    """The checkpoint needs something that the model adapter does not support; the message names it."""


class InvalidRequestError(ChiasmError):
    """The request is invalid; it fails again if it is sent again unchanged."""

    status = 400
    kind = "invalid_request_error"


class AuthenticationError(ChiasmError):
    """The request needs an API key, but has none or a wrong one."""

    status = 401
    kind = "authentication_error"


class ForbiddenError(ChiasmError):
    """The server does nothing for who asks, whatever key the request has."""

    status = 403
    kind = "permission_error"


class ConflictError(InvalidRequestError):
    """The request conflicts with the current state."""

    status = 409


class ModelNotFoundError(ChiasmError):
    """The request names a model that is not served here."""

    status = 404
    kind = "not_found_error"


class PathNotFoundError(ChiasmError):
    """Nothing is served under this path."""

    status = 404
    kind = "not_found_error"


class NotServedError(ChiasmError):
    """vLLM serves this path, but the engine of the instances doesn't."""

    status = 501
    kind = "not_supported_error"

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} is not served here: the built-in engine has chat completions and completions alone. vLLM serves it, if "
            "the model does (chiasm serve --engine vllm).",
            code=Code.NOT_SERVED,
        )


class MethodNotAllowedError(InvalidRequestError):
    """The path exists, but not with this method; ``allow`` lists those that it has."""

    status = 405

    def __init__(self, message: str, *, allow: str = "") -> None:
        super().__init__(message)
        self.allow = allow


class RequestTimeoutError(InvalidRequestError):
    """The client did not send its body in time."""

    status = 408


class PayloadTooLargeError(InvalidRequestError):
    """The request's body is larger than the limit."""

    status = 413


class HeadTooLargeError(InvalidRequestError):
    """The request line and the headers are larger than the limit."""

    status = 431


class UnsupportedMediaTypeError(InvalidRequestError):
    """The request's body is not JSON, or is compressed in a way that is not supported."""

    status = 415


class MediaError(InvalidRequestError):
    """An image of the request's messages could not be fetched or decoded."""

    def __init__(self, message: str, *, param: str | None = "messages", code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)


class OverloadedError(ChiasmError):
    """A queue is full, or no instance can take the request now. It can be sent again after ``retry_after_seconds``."""

    status = 503
    kind = "overloaded_error"

    def __init__(
        self, message: str, *, retry_after_seconds: int = 1, code: str | None = None, limit: str | None = None
    ) -> None:
        super().__init__(message, code=code, limit=limit)
        self.retry_after_seconds = retry_after_seconds


class RateLimitError(OverloadedError):
    """The holder of the API key has sent more than it may; the server itself has room."""

    status = 429
    kind = "rate_limit_error"


class EmbeddingUnavailableError(ChiasmError):
    """The embedding of an image did not arrive before the request's deadline, or is lost."""

    status = 503
    kind = "embedding_unavailable_error"


class StorageError(ChiasmError):
    """An embedding could not be written or read. Only this entry is affected."""

    status = 503
    kind = "storage_error"


class KVUnavailableError(ChiasmError):
    """The prompt's KV could not be fetched from the instance that the handle names; the prompt must be prefilled again."""

    status = 503
    kind = "kv_unavailable_error"


class DeadlineExceededError(ChiasmError):
    """The request's deadline passed."""

    status = 504
    kind = "timeout_error"
