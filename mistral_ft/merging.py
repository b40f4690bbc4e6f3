"""Merging an adapter into checkpoint files, shard by shard, under the checkpoint's own key names."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mistral_ft.errors import UserError
from mistral_ft.files import read_settings, sha256_file
from mistral_ft.images import ImageFitter
from mistral_ft.lora import Adapter, LayerUpdate
from mistral_ft.prompt import PromptEncoder, save_prompt_files
from mistral_ft.run_folder import RUN_FILE, find_run_folder, trained_tokenizer

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

# Files of a base that do not go with a merged model: other copies of its weights, code, and the chat template, which
# save_prompt_files replaces.
NOT_COPIED = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf", "*.py", "chat_template*", ".*")


def read_weight_map(base: Path) -> dict[str, str]:
    """Which shard holds each tensor of a checkpoint: {key: file name}.

    Raises:
        UserError: if there are no safetensors weights, or a shard is missing.
    """
    if (base / INDEX).is_file():
        weight_map = read_settings(base / INDEX)["weight_map"]
        missing = sorted({shard for shard in weight_map.values() if not (base / shard).is_file()})
        if missing:
            raise UserError(f"{base}: {len(missing)} weight files are missing, such as {missing[0]}")
        return weight_map
    if not (base / WEIGHTS).is_file():
        raise UserError(f"{base}: has neither {INDEX} nor {WEIGHTS}")
    with open_shard(base / WEIGHTS) as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        UserError: if it is broken.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: broken file: {error}") from error


def checkpoint_keys(module: str) -> tuple[str, str]:
    """The names that a layer's weight can have in a checkpoint: as in memory, and as in the hub's repository.

    In memory it is model.language_model.layers.0…, on the hub language_model.model.layers.0….
    """
    hub = re.sub(r"^model\.language_model\.", "language_model.model.", module)
    hub = re.sub(r"^lm_head$", "language_model.lm_head", hub)
    return f"{module}.weight", f"{hub.removeprefix('model.')}.weight"


def match_updates(adapter: Adapter, base: Path, weight_map: dict[str, str]) -> dict[str, LayerUpdate]:
    """The adapter's updates by the checkpoint's key, each exactly once.

    Raises:
        UserError: if the checkpoint lacks a layer, or has it with another shape.
    """
    updates: dict[str, LayerUpdate] = {}
    for module, update in adapter.updates.items():
        keys = [key for key in checkpoint_keys(module) if key in weight_map]
        if len(keys) != 1:
            raise UserError(f"{base}: has no tensor for the adapter's layer {module}; is it another model's?")
        with open_shard(base / weight_map[keys[0]]) as file:
            adapter.check_shape(module, tuple(file.get_slice(keys[0]).get_shape()))
        updates[keys[0]] = update
    return updates


def merge_shard(source: Path, target: Path, updates: dict[str, LayerUpdate]) -> None:
    """Copy one shard, with the updates of its tensors applied.

    Raises:
        UserError: if the source is broken.
    """
    with open_shard(source) as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    for key in updates.keys() & tensors.keys():
        tensors[key] = updates[key].apply(tensors[key])
    save_file(tensors, target, metadata)


def copy_other_files(base: Path, folder: Path) -> None:
    """Everything of the base but its weights, byte for byte, with the tokenizer and template that training used."""
    for path in base.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
    save_prompt_files(base, folder)


def check_merged(folder: Path, weight_map: dict[str, str], adapter: Adapter) -> None:
    """Read the merged folder back: every tensor is in its shard, and its prompts are those of the training.

    Raises:
        UserError: if the base's index is wrong, or its tokenizer is not the one the adapter was trained with.
    """
    for shard in set(weight_map.values()):
        with open_shard(folder / shard) as file:
            if set(file.keys()) != {key for key, name in weight_map.items() if name == shard}:
                raise UserError(f"{adapter.base_model}: {INDEX} names other tensors for {shard} than it holds")
    PromptEncoder.from_folder(folder)
    ImageFitter.from_folder(folder)
    run = find_run_folder(adapter.folder)
    if (run / RUN_FILE).is_file() and sha256_file(folder / "tokenizer.json") != trained_tokenizer(run):
        raise UserError(f"{adapter.base_model}: its tokenizer is not the one that {run} was trained with")
