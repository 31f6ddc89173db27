"""Train the demo checkpoint from scratch: ``python training/train_demo.py``.

Two stages, the vision tower alone and then the whole model, on pictures drawn as they are needed.
Everything follows from the seed; two single-threaded processes share each batch.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "src")]

from recipe import model_config  # noqa: E402
from transformers import Qwen3VLForConditionalGeneration  # noqa: E402
from vision_stage import train_vision  # noqa: E402


def work(rank: int, options: argparse.Namespace) -> None:
    """Train as one of the processes."""
    torch.set_num_threads(1)
    if options.processes > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{options.rendezvous}",
            rank=rank,
            world_size=options.processes,
            timeout=timedelta(minutes=10),
        )
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model = Qwen3VLForConditionalGeneration(model_config()).train()

    def log(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    def keep(name: str) -> None:
        if rank == 0:
            partial = options.work / f"{name}.partial"
            torch.save(model.state_dict(), partial)
            partial.rename(options.work / f"{name}.pt")

    log(f"{sum(p.numel() for p in model.parameters())} parameters")
    shared = {"seed": options.seed, "rank": rank, "log": log}
    if options.stage in ("vision", "all"):
        batch = options.vision_batch // options.processes
        train_vision(model, steps=options.vision_steps, batch=batch, save=lambda: keep("vision"), **shared)
        keep("vision")
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    """Parse the command line and start the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("vision", "whole", "all"), default="all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--vision-batch", type=int, default=128, help="pictures a step, over all processes")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder for what is kept between stages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.rendezvous = os.path.join(folder, "rendezvous")
        mp.spawn(work, (options,), nprocs=options.processes)


if __name__ == "__main__":
    main()
