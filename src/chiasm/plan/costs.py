"""What a step, an image and a transfer cost in seconds: the interface, and costs that were measured on this machine.

The built-in engine runs the rows of a step, those of all requests, through each matrix at once, so the time of a step is a
function of its number of rows, and the attention of each request comes on top of it. Measured costs have that function as a
table, for each number of threads.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import msgspec

from chiasm.errors import ConfigurationError
from chiasm.wire import UNREADABLE

FORMAT_VERSION = 2
TOKEN_SECONDS = 0.00035
"""A token of a stream in the instance, the proxy and a client on the same machine: 0.05 to 0.25, 0.03 and about 0.1 ms."""


class StepShape(NamedTuple):
    """What one step of a language model computes."""

    rows: int
    """Tokens of all decodes and prefill chunks."""
    prefill_pairs: float = 0.0
    """Pairs of a prefill row and a token that it attends to."""
    decode_keys: float = 0.0
    """Tokens that decodes attend to."""


class CostModel(ABC):
    """Seconds that work takes on one device when nothing else runs there. ``threads`` counts CPU threads; a GPU has one."""

    @abstractmethod
    def step_seconds(self, step: StepShape, threads: int) -> float:
        """Return the time of a step."""

    @abstractmethod
    def encode_seconds(self, height: int, width: int, threads: int) -> float:
        """Return the time that the vision tower takes for an image of this size in pixels."""

    @abstractmethod
    def prepare_seconds(self, height: int, width: int) -> float:
        """Return the time that one CPU core takes to decode the file and to preprocess the image."""

    @abstractmethod
    def embedding_seconds(self, tokens: int) -> float:
        """Return the time from the end of the encoding until another instance can use the embedding."""

    @abstractmethod
    def kv_seconds(self, tokens: int) -> float:
        """Return the time to move the KV of that many tokens from a prefill to a decode instance."""

    @property
    @abstractmethod
    def request_seconds(self) -> float:
        """What each request takes of a CPU core before it is queued: the proxy, two HTTP servers, tokenizing."""

    @property
    def token_seconds(self) -> float:
        """What sending a token takes of a CPU core."""
        return 0.0

    @property
    def busy_factor(self) -> float:
        """How much longer one thread takes when all other cores compute too: cores share memory and caches."""
        return 1.0


class ThreadCosts(msgspec.Struct, frozen=True):
    """Costs with one number of threads."""

    rows: list[tuple[int, float]]
    """Seconds of a step by its number of rows, ascending, without attention to earlier tokens."""
    prefill_pair_seconds: float
    decode_key_seconds: float
    images: list[tuple[int, float]]
    """Seconds of the vision tower by an image's tokens, ascending."""


class MeasuredFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a calibration run writes."""

    format: int = FORMAT_VERSION
    model: str
    cpu: str
    """The model of the CPU."""
    cores: int
    threads: dict[int, ThreadCosts]
    prepare: list[tuple[int, float]]
    """Seconds of decoding a file and preprocessing by an image's pixels, ascending."""
    image_tokens: dict[str, int] = {}
    """Tokens of the images that were encoded, by ``HEIGHTxWIDTH``, for people."""
    embedding_seconds_per_token: float
    kv_seconds_per_token: float
    request_seconds: float
    token_seconds: float = TOKEN_SECONDS
    busy_factor: float


class MeasuredCosts(CostModel):
    """Costs from a calibration run."""

    def __init__(self, measured: MeasuredFile, tokens_of: Callable[[int, int], int]) -> None:
        self.measured = measured
        self._tokens_of = tokens_of
        self._encode = lru_cache(maxsize=4096)(self._encode_seconds)
        self._rows = lru_cache(maxsize=65_536)(self._rows_seconds)

    def step_seconds(self, step: StepShape, threads: int) -> float:
        costs = self._at(threads)
        attention = step.prefill_pairs * costs.prefill_pair_seconds + step.decode_keys * costs.decode_key_seconds
        return self._rows(step.rows, threads) + attention

    def encode_seconds(self, height: int, width: int, threads: int) -> float:
        return self._encode(self._tokens_of(height, width), threads)

    def prepare_seconds(self, height: int, width: int) -> float:
        return interpolate(self.measured.prepare, height * width)

    def embedding_seconds(self, tokens: int) -> float:
        return tokens * self.measured.embedding_seconds_per_token

    def kv_seconds(self, tokens: int) -> float:
        return tokens * self.measured.kv_seconds_per_token

    @property
    def request_seconds(self) -> float:
        return self.measured.request_seconds

    @property
    def token_seconds(self) -> float:
        return self.measured.token_seconds

    @property
    def busy_factor(self) -> float:
        return self.measured.busy_factor

    @cached_property
    def _counts(self) -> list[int]:
        return sorted(self.measured.threads)

    def _at(self, threads: int) -> ThreadCosts:
        """Return the costs with the largest measured number of threads that isn't above ``threads``."""
        found = bisect_left(self._counts, threads + 1) - 1
        return self.measured.threads[self._counts[max(0, found)]]

    def _rows_seconds(self, rows: int, threads: int) -> float:
        return interpolate(self._at(threads).rows, rows)

    def _encode_seconds(self, tokens: int, threads: int) -> float:
        return interpolate(self._at(threads).images, tokens)


def interpolate(points: Sequence[tuple[int, float]], at: float) -> float:
    """Return the value at ``at`` on the line through ascending points; beyond the last two, their line goes on.

    Below the first point the first value counts, since small pieces of work cost what is fixed.
    """
    if len(points) == 1 or at <= points[0][0]:
        return points[0][1]
    index = min(len(points) - 1, bisect_left(points, at, key=lambda point: point[0]))
    (left, low), (right, high) = points[index - 1], points[index]
    return max(0.0, low + (high - low) * (at - left) / (right - left))


def read_costs(path: Path, model: str) -> MeasuredFile:
    """Read what a calibration run wrote. Raises ConfigurationError if it isn't that, or is for another model."""
    try:
        measured = msgspec.json.decode(path.read_bytes(), type=MeasuredFile)
    except (OSError, *UNREADABLE) as error:
        raise ConfigurationError(
            f"--costs {path} cannot be read as measured costs ({error}); measure them with --calibrate."
        ) from error
    if measured.format != FORMAT_VERSION or not measured.threads:
        raise ConfigurationError(f"--costs {path} is of another version of chiasm; measure again with --calibrate.")
    if measured.model != model:
        raise ConfigurationError(f"--costs {path} is of {measured.model}, not of {model}; measure with --calibrate.")
    return measured


def check_writable(path: Path) -> None:
    """Raise ConfigurationError if measured costs cannot be written there, and make the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(path, error) from error


def write_costs(path: Path, measured: MeasuredFile) -> None:
    """Write measured costs. Raises ConfigurationError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(measured), indent=1) + b"\n")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"The measured costs cannot be written to {path}: {error.strerror}. Name another file with --costs."
    )
