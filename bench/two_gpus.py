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
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def train_in_fp32(arguments: list[str]) -> None:
    """Run train with an fp32 base on the GPU, which a user cannot: attention of varying lengths has no fp32 kernel."""
    import torch

    from mistral_ft import attention, model
    from mistral_ft.errors import run_step

    def varlen_attn(query, key, value, starts, _, longest, __, scale, window_size, **kwargs):
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

    load_base, shard_layers = model.load_base, model.shard_layers
    attention.varlen_attn = varlen_attn
    model.load_base = lambda *arguments: load_base(*arguments).float()
    model.shard_layers = lambda whole, device: shard_layers(whole.float(), device)
    import train

    sys.argv = ["train.py", *arguments]
    run_step(train.main)


class Bench:
    """Runs train in as many processes as told, and reads what it logged.

    Args:
        seconds: after them, what runs is ended.
    """

    def __init__(self, work: Path, seconds: float):
        self.work, self.end = work, time.monotonic() + seconds
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def train(self, name: str, processes: int, *arguments, module: str = "train", shown: bool = True) -> dict | None:
        """trainer_state.json of a run, its folder and its peak memory by process; None if it failed."""
        output = self.work / name
        launch = ["-m"]
        if processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m"]
        command = [sys.executable, *launch, *module.split(), "--output_dir", output, *arguments]
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "4"}
        self.say(f"{name}: {processes} process(es)")
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        lines = []
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
        signal.alarm(max(1, int(self.end - time.monotonic())))
        for line in process.stdout:
            lines.append(line)
            if shown or line.startswith("Each process holds"):
                self.say(f"  {line.rstrip()}")
        signal.alarm(0)
        states = sorted(output.glob("*/trainer_state.json"))
        if process.wait() or not states:
            self.say(f"{name}: FAILED with {process.returncode}")
            print("".join(lines[-60:] if not shown else []), flush=True)
            return None
        state = json.loads(states[-1].read_text())
        peaks = [line for line in lines if line.startswith("Peak GPU memory")]
        return state | {"folder": states[-1].parent, "peak": peaks[-1].strip() if peaks else "no GPU"}


def losses(state: dict) -> list[float]:
    """Of each step."""
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def rate(state: dict) -> float:
    """Tokens per second without the first interval."""
    rates = [entry["tokens_per_second"] for entry in state["log_history"] if "tokens_per_second" in entry][1:]
    return len(rates) / sum(1 / rate for rate in rates)


def compare_losses(bench: Bench, steps: int) -> None:
    """models/tiny in fp32: the losses of two processes, whole and sharded, against those of one."""
    common = [
        "--model_id", "models/tiny", "--dataset", "dataset/train.jsonl", "--max_steps", steps,
        "--learning_rate", "2e-3", "--lora_dropout", 0, "--vision_lora", True, "--train_projector", True,
        "--compile", False, "--packing", False, "--save_strategy", "no", "--dataloader_num_workers", 0,
    ]  # fmt: skip
    module = "bench.two_gpus fp32"
    one = bench.train("tiny-1", 1, *common, "--per_device_train_batch_size", 4, module=module, shown=False)
    for name, more in (("tiny-2", []), ("tiny-2-sharded", ["--shard_base", True])):
        two = bench.train(name, 2, *common, "--per_device_train_batch_size", 2, *more, module=module, shown=False)
        if one and two:
            pairs = list(zip(losses(one), losses(two), strict=True))
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
        bench.say(f"one GPU: {rate(one):,.0f} tokens/s, {one['peak']}")
    if two:
        bench.say(f"two GPUs, a copy of the base each: {rate(two):,.0f} tokens/s, {two['peak']}")
    if one and two:
        bench.say(f"ratio {rate(two) / rate(one):.3f} (goal: at least 1.85)")
    limit = [] if args.tiny else ["--gpu_memory_gib", args.sharded_gib]
    sharded = bench.train("24b-2-sharded", 2, *common, *limit, "--shard_base", True)
    if sharded:
        bench.say(f"two GPUs limited to {args.sharded_gib} GiB, the base sharded: {rate(sharded):,.0f} tokens/s, "
                  f"{sharded['peak']}")  # fmt: skip
        kept = sorted(path.name for path in sharded["folder"].iterdir() if path.name.startswith("adapter_"))
        bench.say(f"saved: {', '.join(kept)}")


def main() -> None:
    if sys.argv[1:2] == ["fp32"]:
        train_in_fp32(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for weights, pages and runs")
    parser.add_argument("--tekken", help="as for bench.random_24b")
    parser.add_argument("--gpu_memory_gib", type=float, default=78.5, help="limit of the runs with a whole base")
    parser.add_argument("--sharded_gib", type=float, default=47.5, help="limit of the sharded run")
    parser.add_argument("--steps", type=int, default=4, help="steps between two logs; three times as many are trained")
    parser.add_argument("--pages", type=int, default=256, help="so many that 12 steps on two GPUs are below an epoch")
    parser.add_argument("--seconds", type=float, default=560, help="what is not measured by then is left out")
    parser.add_argument("--tiny", action="store_true", help="try the script out: models/tiny in the 24B's place")
    args = parser.parse_args()

    bench = Bench(args.work, args.seconds)
    args.work.mkdir(parents=True, exist_ok=True)
    tekken = ["--tekken", args.tekken] if args.tekken else []
    makers = [[sys.executable, "-m", "bench.make_pages", args.work / "pages", "--count", args.pages]]
    if args.tiny:
        (args.work / "24b").symlink_to(ROOT / "models/tiny")
        makers = [[sys.executable, "-c", "import shutil; shutil.copytree('dataset', r'%s')" % (args.work / "pages")]]
    else:
        makers.append([sys.executable, "-m", "bench.random_24b", args.work / "24b", *tekken])
    making = [subprocess.Popen(list(map(str, maker)), cwd=ROOT, stderr=subprocess.DEVNULL) for maker in makers]
    compare_losses(bench, steps=8)
    if any(maker.wait() for maker in making):
        sys.exit("the model or the pages could not be made")
    if args.tiny:
        (args.work / "pages/train.jsonl").rename(args.work / "pages/pages.jsonl")
    bench.say("model and pages are made")
    compare_speed(bench, args)


if __name__ == "__main__":
    main()
