"""What it costs to hand an embedding from a producer to a consumer through a shared folder.

    python benchmarks/ec_handoff.py --folder /dev/shm

The handoff is compared with a plain write of the same bytes to a fresh file in the same folder and a mapped read of it,
in one run. It is to take at most 1.3 times as long, plus one millisecond.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from chiasm.ec_transfer.handoff_benchmark import measure_handoff

_MEGABYTE = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="measured inside (default: /dev/shm)")
    parser.add_argument("--sizes-megabytes", type=float, nargs="+", default=[0.5, 10, 67])
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()

    print(f"{'MB':>6} {'write':>9} {'read':>9} {'memcpy':>9} {'handoff':>9} {'allowed':>9}   ratio   (milliseconds)")
    sizes_bytes = [int(size * _MEGABYTE) for size in arguments.sizes_megabytes]
    for result in measure_handoff(arguments.folder, sizes_bytes, arguments.repeats):
        allowed_seconds = 1.3 * (result.plain_write_seconds + result.mapped_read_seconds) + 1e-3
        seconds = (
            result.plain_write_seconds,
            result.mapped_read_seconds,
            result.memcpy_seconds,
            result.handoff_seconds,
            allowed_seconds,
        )
        columns = " ".join(f"{1000 * value:9.3f}" for value in seconds)
        print(f"{result.size_bytes / _MEGABYTE:6.1f} {columns}   {result.ratio:5.2f}")


if __name__ == "__main__":
    main()
