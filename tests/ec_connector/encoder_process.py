"""A process that publishes the embeddings whose names come on its standard input, and says where it is and what it has."""

from __future__ import annotations

import sys

import msgspec

from tests.ec_connector.peers import Encoder


def main() -> None:
    encoder = Encoder(sys.argv[1])
    print(msgspec.json.encode(encoder.place).decode(), flush=True)
    for line in sys.stdin:
        print(encoder.encode(line.strip()), flush=True)


if __name__ == "__main__":
    main()
