"""Workers of an instance in processes of their own, which a test drives as the instance's engine would."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from chiasm.ec_transfer import ECConnectorFactory, ECConnectorMetadata, ECConnectorRole, ECTransferConfig
from chiasm.errors import StorageError

from .instance import embedding_of, identifier_of
from .peers import PATIENCE_SECONDS
from .processes import PROCESSES


class WorkerProcess:
    """The worker role of a connector elsewhere. It has what it has loaded until it is told to forget it."""

    def __init__(self, config: ECTransferConfig) -> None:
        self._pipe, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=_serve, args=(theirs, config, dict(os.environ)), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def run(self, metadata: ECConnectorMetadata, *, saves: tuple[str, int] | None = None) -> dict[str, bytes]:
        """Have it run a step; return all that it has in memory then, as bytes. See ``begin`` and ``end``."""
        self.begin(metadata, saves=saves)
        return self.end()

    def begin(self, metadata: ECConnectorMetadata, *, saves: tuple[str, int] | None = None) -> None:
        """Send it a step, in which it also publishes the embedding of a name with so many rows."""
        self._pipe.send((pickle.dumps(metadata), saves))

    def end(self) -> dict[str, bytes]:
        """Return what it has once the step is over. Raises StorageError if it could not publish."""
        assert self._pipe.poll(2 * PATIENCE_SECONDS), "the worker did not answer"
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise StorageError(answer)
        assert isinstance(answer, dict)
        return answer

    def forget(self) -> None:
        """Have it drop what it has loaded."""
        self._pipe.send(None)
        assert self.end() == {}

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone; idempotent."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _serve(pipe: Connection, config: ECTransferConfig, environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    worker = ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)
    cache: dict[str, Any] = {}
    with contextlib.suppress(EOFError):
        while True:
            if (told := pipe.recv()) is None:
                cache.clear()
                pipe.send({})
                continue
            metadata, saves = told
            worker.bind_connector_metadata(pickle.loads(metadata))
            worker.start_load_caches(cache)
            try:
                if saves is not None:
                    worker.save_caches({identifier_of(saves[0]): embedding_of(*saves)}, identifier_of(saves[0]))
            except StorageError as error:
                pipe.send(error.message)
            else:
                pipe.send({name: bytes_of(tensor) for name, tensor in cache.items()})
            worker.clear_connector_metadata()
    worker.shutdown()
