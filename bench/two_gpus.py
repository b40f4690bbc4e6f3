"""Two GPUs of one host against one: training speed at full size, the base sharded, and the same losses.

    python -m bench.two_gpus /tmp/two --tekken tekken_240911.json

Needs 60 GB of disk, 8 minutes. In this order, each printed when it is known:

1. the loss curve of models/tiny in fp32 on one GPU and on two, whole and sharded, at the same global batch;
2. tokens per second of the 24B (random weights) on one GPU and on two with a copy of the base each;
3. the 24B sharded over two GPUs limited to less memory than the whole base needs, and the peak of each.

Tokens are those of records. The first of the logged intervals, which holds what is slow once, does not count.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import steps
from mistral_ft.cli import run_step
from mistral_ft.model import attention
from mistral_ft.model import loading as model


def fp32_attention(query, key, value, starts, _, longest, __, scale, window_size, **kwargs):
    """torch's varlen_attn, which has no fp32 kernel, in as many calls as there are records."""
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1)[None] for x in (query, key, value)),
            is_causal=window_size[1] == 0,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )[0].transpose(0, 1)
        for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False)
        if end > start
    ]
    return torch.cat(parts)


def train_in_fp32(arguments: list[str]) -> None:
    """Run train with an fp32 base on the GPU, which a user cannot."""
    load_base, shard_layers = model.load_base, model.shard_layers
    attention.varlen_attn = fp32_attention
    model.load_base = lambda *arguments, **named: load_base(*arguments, **named).float()
    model.shard_layers = lambda whole, device: shard_layers(whole.float(), device)
    import train

    sys.argv = ["train.py", *arguments]
    run_step(train.main)


@dataclass
class Run:
    """What came of a training.

    Attributes:
        losses: of each step.
        speed: tokens per second.
        peak: GPU memory, of each process.
        lines: what train printed.
    """

    folder: Path
    losses: list[float]
    speed: float
    peak: str
    lines: list[str]


class Bench:
    """Runs train in as many processes as told, and reads what it logged.

    Args:
        seconds: after them, what runs is ended.
    """

    def __init__(self, work: Path, seconds: float):
        self.work, self.end = work, time.monotonic() + seconds
        self.started = time.monotonic()
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def train(self, name: str, processes: int, *arguments, step: tuple = ("train",), shown: bool = True) -> Run | None:
        """Train in so many processes; None if it failed."""
        self.say(f"{name}: {processes} process(es)")
        done = steps.run(
            *step, "--output_dir", self.work / name, *arguments, processes=processes, shown=shown,
            seconds=max(1, self.end - time.monotonic()),
            environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "4"},
        )  # fmt: skip
        if done.code:
            self.say(f"{name}: FAILED with {done.code}")
            self.failed.append(name)
            return None
        folder = steps.run_folder(done.lines)
        logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in logs if "loss" in entry]
        return Run(folder, losses, steps.tokens_per_second(folder), steps.peak_memory(done.lines), done.lines)


def compare_losses(bench: Bench, trained_steps: int) -> None:
    """models/tiny in fp32: the losses of two processes, whole and sharded, against those of one."""
    common = [
        "--model_id", steps.ROOT / "models/tiny", "--dataset", steps.ROOT / "dataset/train.jsonl",
        "--max_steps", trained_steps, "--learning_rate", "2e-3", "--lora_dropout", 0, "--vision_lora", True,
        "--train_projector", True, "--compile", False, "--packing", False, "--save_strategy", "no",
        "--dataloader_num_workers", 0,
    ]  # fmt: skip
    step = ("bench.two_gpus", "fp32")
    one = bench.train("tiny-1", 1, *common, "--per_device_train_batch_size", 4, step=step, shown=False)
    for name, more in (("tiny-2", []), ("tiny-2-sharded", ["--shard_base", True])):
        two = bench.train(name, 2, *common, "--per_device_train_batch_size", 2, *more, step=step, shown=False)
        if one and two:
            pairs = list(zip(one.losses, two.losses, strict=True))
            worst = max(abs(a - b) / a for a, b in pairs)
            bench.say(
                f"{name}: {len(pairs)} losses, {pairs[0][0]:.6f} to {pairs[-1][0]:.6f} on one GPU, {pairs[0][1]:.6f} "
                f"to {pairs[-1][1]:.6f} on two, largest relative difference {worst:.1e} (at most 1e-4: {worst <= 1e-4})"
            )


def compare_speed(bench: Bench, args: argparse.Namespace) -> None:
    """The 24B on one GPU, on two, and sharded over two."""
    model, data = bench.work / "24b", bench.work / "pages/pages.jsonl"
    common = [
        "--model_id", model, "--dataset", data, "--max_steps", 3 * args.steps, "--logging_steps", args.steps,
        "--learning_rate", "1e-4", "--save_strategy", "no", "--tf32", True,
    ]  # fmt: skip
    if args.tiny:
        common = [*common[:-2], "--pack_length", 512]
    limit = [] if args.tiny else ["--gpu_memory_gib", args.gpu_memory_gib]
    one = bench.train("24b-1", 1, *common, *limit)
    two = bench.train("24b-2", 2, *common, *limit)
    if one:
        bench.say(f"one GPU: {one.speed:,.0f} tokens/s, {one.peak}")
    if two:
        bench.say(f"two GPUs, a copy of the base each: {two.speed:,.0f} tokens/s, {two.peak}")
    if one and two:
        bench.say(f"ratio {two.speed / one.speed:.3f} (goal: at least 1.85)")
    limit = [] if args.tiny else ["--gpu_memory_gib", args.sharded_gib]
    sharded = bench.train("24b-2-sharded", 2, *common, *limit, "--shard_base", True)
    if sharded:
        bench.say(f"two GPUs limited to {args.sharded_gib} GiB, the base sharded: {sharded.speed:,.0f} tokens/s, "
                  f"{sharded.peak}")  # fmt: skip
        bench.say(steps.said(sharded.lines, r"(Each process holds .+)"))
        kept = sorted(path.name for path in sharded.folder.iterdir() if path.name.startswith("adapter_"))
        bench.say(f"saved: {', '.join(kept)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for weights, pages and runs")
    parser.add_argument("--tekken", help="as for bench.random_24b")
    parser.add_argument("--gpu_memory_gib", type=float, default=78.5, help="limit of the runs with a whole base")
    parser.add_argument("--sharded_gib", type=float, default=47.5, help="limit of the sharded run")
    parser.add_argument("--steps", type=int, default=4, help="steps between two logs; three times as many are trained")
    parser.add_argument("--pages", type=int, default=256, help="so many that 12 steps on two GPUs are below an epoch")
    parser.add_argument("--seconds", type=float, default=560, help="what is not measured by then is left out")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model and small pages, to try this script on a CPU"
    )
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["fp32"]:
        train_in_fp32(sys.argv[2:])
        return
    args = parse_arguments()
    bench = Bench(args.work, args.seconds)
    args.work.mkdir(parents=True, exist_ok=True)
    tekken = ["--tekken", args.tekken] if args.tekken else []
    makers = [
        steps.start("bench.make_pages", args.work / "pages", "--count", args.pages, "--scale", 0.1 if args.tiny else 1),
        steps.start("bench.random_24b", args.work / "24b", *tekken, *(["--tiny"] if args.tiny else [])),
    ]
    compare_losses(bench, trained_steps=2 if args.tiny else 8)
    for maker in makers:
        said, _ = maker.communicate()
        if maker.returncode:
            sys.exit(f"the model or the pages could not be made: {said}")
    bench.say("model and pages are made")
    compare_speed(bench, args)
    if bench.failed:
        sys.exit(f"not measured: {', '.join(bench.failed)}")


if __name__ == "__main__":
    main()
