"""Merging an adapter into checkpoint files, tensor by tensor, under the checkpoint's own key names, and proving it."""

import itertools
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mistral_ft.data.image_fitter import ImageFitter
from mistral_ft.data.prompt.encoder import PromptEncoder
from mistral_ft.data.prompt.files import save_prompt_files
from mistral_ft.errors import UserError
from mistral_ft.files import sha256_file
from mistral_ft.folders import find_model_folder, find_quantization
from mistral_ft.merging.shards import Shard, open_shard, read_checkpoint
from mistral_ft.model.adapter import Adapter, LayerUpdate, Replacement, hub_name
from mistral_ft.model.loading import check_model_folder
from mistral_ft.progress import Progress

# Files of a base that do not go with a merged model: other copies of its weights, code, its own model card, and the
# chat template, which save_prompt_files replaces.
NOT_COPIED = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf", "*.py", "README.md", "chat_template*", ".*")

# Types whose values are the weights. Others (FP8, packed 4-bit) mean something only together with their scales.
MERGEABLE_DTYPES = ("BF16", "F16", "F32")

# Weights that a thread merges at once: in fp32, with the product beside it, they stay in a core's cache. Fewer rows
# than 32 take another path through the matrix product, whose last bits are not those of the whole.
BLOCK_BYTES = 2 << 20
MIN_ROWS = 64
MAX_THREADS = 16

# What one call writes. Linux 6.18 with ext4 spends five times the time on the same bytes in calls of 2 MiB.
WRITE_BYTES = 64 << 10


def find_base(adapter: Adapter, base_model: str | None) -> Path:
    """The folder of the base to merge onto: the one the adapter names, or `base_model`.

    Raises:
        UserError: if it cannot be found, is no Mistral3, or its weights are quantized.
    """
    base = find_model_folder(base_model) if base_model else adapter.find_base()
    check_model_folder(base)
    if kind := find_quantization(str(base)):
        raise UserError(f"{base}: its weights are quantized ({kind}); give the bf16 model they are from: --base_model")
    return base


def base_note(adapter: Adapter, base_model: str) -> str | None:
    """What it means to merge onto this base, if it is not quite the one the adapter was trained on; else None."""
    rounding = adapter.rounding
    kind = f"rounded to {rounding}" if rounding else find_quantization(adapter.base_model)
    if kind:
        return (
            f"Merging onto {base_model}; the adapter was trained on {adapter.base_model} ({kind}) and has learned to "
            "make up for that model's rounding, which this one does not have: score the merged model before you rely "
            "on it"
        )
    if base_model != adapter.base_model:
        return f"Merging onto {base_model}; the adapter was trained on {adapter.base_model}"
    return None


def match_updates(adapter: Adapter, base: Path, shards: list[Shard]) -> dict[str, LayerUpdate | Replacement]:
    """The adapter's updates by the checkpoint's key, each exactly once.

    Raises:
        UserError: if the checkpoint lacks a parameter, or has it in another shape or in a type that cannot be merged.
    """
    tensors = {key: span for shard in shards for key, span in shard.tensors.items()}
    updates: dict[str, LayerUpdate | Replacement] = {}
    for name, update in adapter.updates.items():
        key = next((key for key in (name, hub_name(name)) if key in tensors), None)
        if key is None:
            raise UserError(f"{base}: has no tensor for the adapter's {name}; is it another model's?")
        adapter.check_shape(name, tensors[key].shape)
        if tensors[key].dtype not in MERGEABLE_DTYPES:
            raise UserError(
                f"{base}: {key} is stored as {tensors[key].dtype}; merge onto the bf16 model that this one was made "
                "from, with --base_model"
            )
        updates[key] = update
    assert sum(update.tensor_count for update in updates.values()) == adapter.tensor_count
    return updates


def merge_weights(shards: list[Shard], folder: Path, updates: dict[str, LayerUpdate | Replacement]) -> int:
    """Write the merged shards into `folder`, and read every tensor again to prove it.

    Each file is its base's, header included, with other bytes where an update belongs. Tensors are maps of the files,
    so that memory holds little more than a block for each thread.

    Returns:
        How many tensors differ from the base's.

    Raises:
        UserError: if what is read again is not what it should be.
    """
    for shard in shards:
        with open(folder / shard.path.name, "wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    # The files in turn, because a file system lets one thread at a time write into a file.
    turns = itertools.zip_longest(*([(shard, key) for key in shard.tensors] for shard in shards))
    tasks = [task for turn in turns for task in turn if task]
    megabytes = sum(shard.tensors[key].size for shard, key in tasks) // 10**6
    progress = Progress("merging", megabytes, "MB")

    def merge(task: tuple[Shard, str]) -> bool:
        shard, key = task
        write_tensor(shard, folder / shard.path.name, key, updates.get(key))
        return prove_tensor(shard, folder / shard.path.name, key, updates.get(key))

    changed = done = 0
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the parallel work is in the tasks
    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    try:
        for (shard, key), differs in zip(tasks, pool.map(merge, tasks), strict=True):
            changed += differs
            done += shard.tensors[key].size
            if step := done // 10**6 - progress.done:
                progress.update(step)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)
        progress.close()
    return changed


def write_tensor(shard: Shard, target: Path, key: str, update: LayerUpdate | Replacement | None) -> None:
    """Write one tensor where it belongs in the target: the base's, with the update if there is one."""
    with open_shard(shard.path) as base, open(target, "r+b") as file:
        weight = base.get_tensor(key)
        file.seek(shard.tensors[key].start)
        for rows in row_blocks(weight):
            block = weight[rows]
            data = _bytes(update.apply(block, rows) if update else block)
            for start in range(0, len(data), WRITE_BYTES):
                file.write(data[start : start + WRITE_BYTES])


def prove_tensor(shard: Shard, target: Path, key: str, update: LayerUpdate | Replacement | None) -> bool:
    """Read one tensor again, as whoever loads the folder will, and hold every bit against what it should be.

    Returns:
        Whether it differs from the base's.

    Raises:
        UserError: if it is neither the base's bits nor those of the update's formula.
    """
    differs = False
    with open_shard(shard.path) as base, open_shard(target) as merged:
        weight, written = base.get_tensor(key), merged.get_tensor(key)
        good = (weight.dtype, weight.shape) == (written.dtype, written.shape)
        for rows in row_blocks(weight):
            same = np.array_equal(_bytes(written[rows]), _bytes(weight[rows]))
            differs = differs or not same
            if update:
                same = np.array_equal(_bytes(written[rows]), _bytes(update.apply(weight[rows], rows)))
            good = good and same
    if not good:
        should = "the base's with the adapter's change" if update else "the base's"
        raise UserError(f"{target.name}: {key}, read again, is not {should}: are disk and memory sound?")
    return differs


def row_blocks(weight: torch.Tensor) -> Iterator[Any]:
    """Slices of a tensor's rows, about BLOCK_BYTES each and all of like size; `...`, the whole, of one without rows."""
    if weight.ndim == 0:
        yield ...
        return
    rows = len(weight)
    count = max(1, min(rows // MIN_ROWS, weight.nbytes // BLOCK_BYTES))
    for start, stop in itertools.pairwise(rows * i // count for i in range(count + 1)):
        yield slice(start, stop)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def copy_other_files(base: Path, folder: Path) -> None:
    """Everything of the base but its weights, byte for byte, with the tokenizer and template that training used."""
    for path in base.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
    save_prompt_files(base, folder)


def check_folder(folder: Path, base: Path, adapter: Adapter) -> None:
    """Load what a merged folder holds beside its weights: config, index, tokenizer and page settings.

    Raises:
        UserError: if one does not load, or the tokenizer is not the one the adapter was trained with.
    """
    from transformers import AutoConfig

    AutoConfig.from_pretrained(folder)
    read_checkpoint(folder)
    PromptEncoder.from_folder(folder)
    ImageFitter.from_folder(folder)
    trained_with = adapter.run.get("prompt", {}).get("tokenizer_sha256")
    if adapter.run and sha256_file(folder / "tokenizer.json") != trained_with:
        raise UserError(f"{base}: its tokenizer is not the one that {adapter.folder} was trained with")
