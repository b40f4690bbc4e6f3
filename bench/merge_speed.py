"""Merge a full-size adapter, against a plain copy of the same bytes: seconds of both, and the merge's peak memory.

    python -m bench.merge_speed WORK_FOLDER [--layers 40] [--device cuda] [--rank 16]

Makes a base of 48 GB with random weights and an adapter of the given rank on all linear layers of its text model,
copies the base (and deletes the copy again), then runs merge_lora_weights with its proof. Both sides read the base from
wherever the system keeps it after it was written, and both end with their bytes on the disk. Needs 100 GB of disk in
WORK_FOLDER, and leaves the base, the adapter and the merged folder there.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench import steps
from bench.random_24b import add_size_arguments, config_24b
from mistral_ft.files import fsync_path
from mistral_ft.merging.shards import read_checkpoint
from mistral_ft.model.adapter import TEXT_LAYERS, memory_name
from models.tiny.build import tiny_config, write_weights

TINY = steps.ROOT / "models/tiny"


def write_base(folder: Path, config, device: str) -> None:
    """Random weights, with the embedded base's tokenizer and processor files, which a merge only copies and loads."""
    folder.mkdir(parents=True)
    for path in TINY.glob("*.json"):
        if not path.name.startswith("model"):
            shutil.copyfile(path, folder / path.name)
    write_weights(folder, config, seed=0, max_shard_size="5GB", device=device)


def write_adapter(folder: Path, base: Path, rank: int) -> None:
    """A random adapter whose change is of the size of the weights' last digits, as a trained one's."""
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    tensors = {}
    for shard in read_checkpoint(base):
        for key, span in shard.tensors.items():
            module = memory_name(key).removesuffix(".weight")
            if re.fullmatch(TEXT_LAYERS, module):
                tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, span.shape[1]) * 0.01
                tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(span.shape[0], rank) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": TEXT_LAYERS}))


def copy(source: Path, target: Path) -> None:
    """A plain copy whose bytes are on the disk at the end."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
    for path in target.iterdir():
        fsync_path(path)


def merge(adapter: Path, target: Path) -> steps.Step:
    """Merge in a process of its own."""
    done = steps.run("merge_lora_weights", adapter, target, environment={"HF_HUB_OFFLINE": "1"})
    if done.code:
        sys.exit(f"the merge ended with code {done.code}")
    return done


def timed(what: str, size: int, function, *arguments):
    """Run it, print seconds and speed, and return (seconds, result)."""
    os.sync()  # what was written before is not to be waited for here
    started = time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - started
    print(f"{what}: {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s", flush=True)
    return seconds, result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    add_size_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    work = args.work.resolve()
    base, adapter, copied, merged = (work / name for name in ("base", "adapter", "copy", "merged"))

    started = time.perf_counter()
    write_base(base, tiny_config() if args.tiny else config_24b(args.layers), args.device)
    write_adapter(adapter, base, args.rank)
    size = sum(path.stat().st_size for path in base.iterdir())
    seconds, shards = time.perf_counter() - started, len(list(base.glob("*.safetensors")))
    print(f"{size / 1e9:.1f} GB in {shards} shards made in {seconds:.0f} s; rank {args.rank}, {os.cpu_count()} cores")

    copy_seconds, _ = timed("copy", size, copy, base, copied)
    shutil.rmtree(copied)
    merge_seconds, done = timed("merge and proof", size, merge, adapter, merged)
    print(f"ratio {merge_seconds / copy_seconds:.2f}")
    print(f"peak anonymous memory {done.own_gib:.2f} GiB, with mapped files {done.resident_gib:.2f} GiB")


if __name__ == "__main__":
    main()
