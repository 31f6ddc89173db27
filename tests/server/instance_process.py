"""``python -m tests.server.instance_process FOLDER PORT`` runs a pd instance as the command line would."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from chiasm.ec_transfer import ECTransferConfig, ECTransferRole
from chiasm.engine import EngineConfig
from chiasm.errors import ConfigurationError
from chiasm.server import ServerConfig, run
from chiasm.wire import Role


def main(folder: str, port: str) -> int:
    with tempfile.TemporaryDirectory() as store:
        ec = ECTransferConfig(role=ECTransferRole.CONSUMER, connector_extra_config={"shared_storage_path": store})
        config = EngineConfig(Path(folder), Role.PD, threads=1, kv_cache_bytes=16 << 20, ec=ec)
        try:
            server = ServerConfig(port=int(port), shutdown_timeout_seconds=300)  # a stream may take its time
            run(config, server, on_ready=lambda url: print(url, flush=True))
        except ConfigurationError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
