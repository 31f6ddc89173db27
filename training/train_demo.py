"""Train the demo checkpoint from scratch: ``python training/train_demo.py``.

There are two stages, the vision tower alone and then the whole model, on images that are drawn as they are needed.
Everything follows from the seed. Two single-threaded processes share each batch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "src")]

from assets import train_tokenizer, write_assets  # noqa: E402
from parallel import Clock  # noqa: E402
from recipe import CHECKPOINT, ID, model_config  # noqa: E402
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen3VLForConditionalGeneration  # noqa: E402
from vision_stage import train_vision  # noqa: E402
from whole_stage import train_whole  # noqa: E402
from workers import die_with_parent  # noqa: E402


def write_checkpoint(folder: Path, model: Qwen3VLForConditionalGeneration, tokenizer: Qwen2Tokenizer) -> None:
    """Write the folder that the package ships: weights in bfloat16, tokenizer, chat template and processor settings."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[ID["<|im_end|>"], ID["<|endoftext|>"]],
        pad_token_id=ID["<|endoftext|>"],
        max_new_tokens=48,
    )
    copy = Qwen3VLForConditionalGeneration(model_config())
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
    write_assets(folder, tokenizer)


def work(rank: int, options: argparse.Namespace) -> None:
    """Run one of the training processes."""
    die_with_parent()
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
    config = model_config()
    config._attn_implementation = "eager"  # the backward pass of the fused kernel in bfloat16 is slow on CPUs
    model = Qwen3VLForConditionalGeneration(config).train()
    tokenizer = train_tokenizer(options.seed)

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
        train_vision(
            model,
            steps=options.vision_steps,
            stop=options.vision_stop,
            batch=batch,
            save=lambda: keep("vision"),
            **shared,
        )
        keep("vision")
    if options.stage in ("whole", "longer"):
        kept = options.work / ("vision.pt" if options.stage == "whole" else "whole.pt")
        model.load_state_dict(torch.load(kept, weights_only=True))
    if options.stage in ("whole", "longer", "all"):
        batch = options.whole_batch // options.processes

        def save() -> None:
            keep("whole")
            if rank == 0:
                write_checkpoint(options.out, model, tokenizer)

        train_whole(
            model,
            tokenizer,
            clock=Clock(options.whole_steps, options.whole_minutes),
            longer=options.stage == "longer",
            longer_rate=options.longer_rate,
            batch=batch,
            save=save,
            **shared,
        )
        save()
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    """Parse the command line and start the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--stage",
        choices=("vision", "whole", "longer", "all"),
        default="all",
        help="longer: continue to train the whole model",
    )
    parser.add_argument("--seed", type=int, default=3, help="seed of everything, including the tokenizer")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--vision-steps", type=int, default=2400)
    parser.add_argument("--vision-stop", type=int, default=2000, help="steps before the second stage takes over")
    parser.add_argument("--vision-batch", type=int, default=64, help="images per step, over all processes")
    parser.add_argument("--whole-steps", type=int, default=2400)
    parser.add_argument("--whole-minutes", type=float, help="end the second stage by the clock instead of by its steps")
    parser.add_argument(
        "--longer-rate", type=float, default=0.6, help="factor of the learning rates for --stage longer"
    )
    parser.add_argument("--whole-batch", type=int, default=48, help="conversations per step, over all processes")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="the checkpoint's folder")
    parser.add_argument(
        "--work", type=Path, default=Path("build/demo"), help="folder for the weights kept between stages"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.rendezvous = os.path.join(folder, "rendezvous")
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=work, args=(rank, options)) for rank in range(options.processes)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit("a training process failed")


if __name__ == "__main__":
    main()
