"""Every error that chiasm raises on purpose.

A message says what is wrong and what to do about it. ``status`` is the HTTP status that a server answers with,
``kind`` the ``error.type`` of an OpenAI error body. Errors of configuration end the process with exit code 2.
"""


class ChiasmError(Exception):
    """Base of all errors that chiasm raises on purpose; ``str(error)`` is fit to be shown to a client."""

    status = 500
    kind = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ConfigurationError(ChiasmError):
    """What was asked for at start cannot be served (a missing model, a port in use, no memory)."""


class UnsupportedModelError(ConfigurationError):
    """The checkpoint needs something that the model adapter does not do; the message names it."""


class InvalidRequestError(ChiasmError):
    """The request itself is wrong; sending it again unchanged fails again."""

    status = 400
    kind = "invalid_request_error"


class ModelNotFoundError(ChiasmError):
    """The request names a model that is not served here."""

    status = 404
    kind = "not_found_error"


class PayloadTooLargeError(InvalidRequestError):
    """The body, or a picture in it, is larger than the limit."""

    status = 413


class MediaError(InvalidRequestError):
    """A media part could not be fetched or is not a picture that can be decoded."""


class OverloadedError(ChiasmError):
    """A queue is full or no instance can take the request now; try again after ``retry_after_seconds``."""

    status = 503
    kind = "overloaded_error"

    def __init__(self, message: str, *, retry_after_seconds: int = 1, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_seconds = retry_after_seconds


class EmbeddingUnavailableError(ChiasmError):
    """An item's embedding did not come within the request's deadline, or was lost for good."""

    status = 503
    kind = "embedding_unavailable_error"


class DeadlineExceededError(ChiasmError):
    """The request's deadline passed."""

    status = 504
    kind = "timeout_error"


class StorageError(ChiasmError):
    """An embedding could not be written or read; the entry is lost, the instance is not."""

    status = 503
    kind = "storage_error"


class KVUnavailableError(ChiasmError):
    """A prompt's KV cannot be had from where the handle says; the prompt must be prefilled again."""

    status = 503
    kind = "kv_unavailable_error"
