"""LoRA: which layers get an adapter, how an adapter is read, and what it does to a weight."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from mistral_ft.errors import UserError
from mistral_ft.files import read_settings
from mistral_ft.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE, find_model_folder, find_run_folder, read_run
from mistral_ft.model.rounding import rounding_of

TEXT_LAYERS = r"model\.(language_model\.)?layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
VISION_LAYERS = (
    r"model\.vision_tower\.transformer\.layers\.\d+\.(attention\.[qkvo]_proj|feed_forward\.(gate|up|down)_proj)"
)
PROJECTOR = r"model\.multi_modal_projector\.(patch_merger\.merging_layer|linear_[12])"

# What an adapter may hold whole, by the name it has in peft's `modules_to_save`.
WHOLE_MODULES = {"multi_modal_projector": "model.multi_modal_projector."}

# Settings of an adapter that say how it was made, or that `Adapter` obeys. Any other that is set is refused.
MERGEABLE_SETTINGS = set(
    "auto_mapping base_model_name_or_path bias exclude_modules inference_mode init_lora_weights layers_pattern "
    "layers_to_transform lora_alpha lora_dropout alpha_pattern rank_pattern megatron_core modules_to_save peft_type "
    "peft_version qalora_group_size r revision target_modules task_type use_dora use_rslora".split()
)


@dataclass(frozen=True)
class LayerUpdate:
    """What an adapter holds for one linear layer.

    Attributes:
        lora_A: (rank, in features).
        lora_B: (out features, rank).
        scaling: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA.
        magnitude: DoRA's norm of each output row, (out features,); None for plain LoRA.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight it belongs to."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def tensor_count(self) -> int:
        """How many of the adapter's tensors it holds."""
        return 2 if self.magnitude is None else 3

    def apply(self, weight: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """The merged weight, summed in fp32 and rounded once to `weight`'s dtype.

        LoRA (Hu et al. 2021): W + s·BA. DoRA (Liu et al. 2024): m · V / ‖V‖ by row, with V = W + s·BA. The order of
        the operations is that of peft's `merge_and_unload`, so that in fp32 both give the same bits.

        Args:
            weight: the layer's, or only the given rows of it.
            rows: which of the layer's rows those are.
        """
        device = weight.device
        merged = self.lora_B[rows].float().to(device) @ self.lora_A.float().to(device)
        merged *= self.scaling
        merged += weight.float()
        if self.magnitude is not None:
            merged *= (self.magnitude[rows].float().to(device) / merged.norm(dim=1))[:, None]
        return merged.to(weight.dtype)


@dataclass(frozen=True)
class Replacement:
    """A whole parameter that an adapter holds instead of the base's (peft's `modules_to_save`)."""

    value: torch.Tensor
    tensor_count = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the parameter."""
        return tuple(self.value.shape)

    def apply(self, weight: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """The parameter, or the given rows of it, in `weight`'s dtype."""
        return self.value[rows].to(weight)


class Adapter:
    """A LoRA adapter folder, read without its base.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
        UserError: if a file is missing or broken, or the adapter is of a kind that cannot be merged here.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder / name}: missing; an adapter folder made by train has one")
        self.config = read_settings(self.folder / ADAPTER_CONFIG)
        _check_kind(self.folder / ADAPTER_CONFIG, self.config)
        self.base_model: str = self.config["base_model_name_or_path"]
        # By the name that the parameter has in memory, such as model.language_model.layers.0.mlp.up_proj.weight.
        self.updates: dict[str, LayerUpdate | Replacement] = {}
        for name, update in self._read_updates():
            if name in self.updates:
                raise UserError(f"{self.folder / ADAPTER_WEIGHTS}: holds two updates of {name}")
            self.updates[name] = update

    def find_base(self, weights: bool = True) -> Path:
        """The base's folder.

        Raises:
            UserError: if it cannot be found, naming the file that names it.
        """
        try:
            return find_model_folder(self.base_model, weights)
        except UserError as error:
            raise UserError(f"{error} (named in {self.folder / ADAPTER_CONFIG})") from None

    @property
    def run(self) -> dict[str, Any]:
        """The run.json of the run that made it; empty if train did not."""
        folder = find_run_folder(self.folder)
        return read_run(folder) if (folder / RUN_FILE).is_file() else {}

    @property
    def rounding(self) -> str | None:
        """What the base's weights were rounded to, while they were loaded, for train to make it; None if nothing."""
        return rounding_of(self.run.get("settings", {}).get("model", {}))

    @staticmethod
    def is_one(folder: str | os.PathLike) -> bool:
        """Whether the folder holds an adapter."""
        return (Path(folder) / ADAPTER_CONFIG).is_file()

    def merge_into(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Merge into a loaded base, in place; the result is rounded to `dtype`, as in a merged folder.

        Args:
            dtype: that of the base's checkpoint. A base that was loaded in fp32 then gets the very weights that
                merge_lora_weights would have written.

        Raises:
            UserError: if the base lacks one of the adapter's layers, or it has another shape.
        """
        for name, update in self.updates.items():
            try:
                weight = model.get_parameter(name)
            except AttributeError:
                raise UserError(f"{self.folder}: the base has no {name}; is it another model's?") from None
            self.check_shape(name, tuple(weight.shape))
            with torch.no_grad():
                weight.copy_(update.apply(weight.to(dtype)))

    def put_on(self, model: nn.Module) -> nn.Module:
        """Wrap a loaded base with the adapter, unmerged, as peft runs it.

        Raises:
            UserError: if peft does not load the adapter as it is in its file: it passes over tensors whose names it
                does not know, and the answers would be the base's.
        """
        from peft import PeftModel  # slow to import, and merge does without

        wrapped = PeftModel.from_pretrained(model, self.folder)
        self.check_loaded(wrapped)
        return wrapped

    def check_loaded(self, wrapped: nn.Module) -> None:
        """Raises UserError unless a model that is wrapped by peft has this adapter's values, all of them."""
        from peft import get_peft_model_state_dict

        path = self.folder / ADAPTER_WEIGHTS
        loaded, stored = get_peft_model_state_dict(wrapped), load_file(path)
        same = loaded.keys() == stored.keys() and all(
            torch.equal(loaded[key].float().cpu(), stored[key].float()) for key in stored
        )
        if not same:
            raise UserError(f"{path}: peft does not load this adapter as it is, so it cannot be used unmerged")

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError if the parameter has not the shape that the adapter was trained on."""
        expected = self.updates[name].shape
        if shape != expected:
            raise UserError(f"{self.folder}: {name} is {expected} here but {shape} in the base; is it another model's?")

    def _read_updates(self) -> Iterator[tuple[str, LayerUpdate | Replacement]]:
        path = self.folder / ADAPTER_WEIGHTS
        layers: dict[str, dict[str, torch.Tensor]] = {}
        replaced: list[str] = []
        whole = {module: WHOLE_MODULES[module] for module in self.config.get("modules_to_save") or []}
        try:
            with safe_open(path, "pt") as file:
                self.tensor_count = len(file.keys())
                for key in file.keys():  # noqa: SIM118 - it is no dict
                    tensor = file.get_tensor(key)
                    if not tensor.isfinite().all():
                        raise UserError(f"{path}: {key} holds values that are no numbers; the training went wrong")
                    name = key.removeprefix("base_model.model.")
                    match = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name)
                    if match and name != key:
                        layers.setdefault(match[1], {})[match[2]] = tensor
                    elif memory_name(name).startswith(tuple(whole.values())):
                        replaced.append(memory_name(name))
                        yield memory_name(name), Replacement(tensor)
                    else:
                        raise UserError(f"{path}: holds {key}, which is no part of an adapter that can be merged")
        except SafetensorError as error:
            raise UserError(f"{path}: broken file: {error}") from error
        if not layers:
            raise UserError(f"{path}: holds no LoRA matrices")
        if missing := [module for module, prefix in whole.items() if not any(n.startswith(prefix) for n in replaced)]:
            raise UserError(f"{path}: holds nothing for modules_to_save {missing}")
        for name, parts in layers.items():
            if not {"lora_A", "lora_B"} <= parts.keys():
                raise UserError(f"{path}: {name} has lora_A or lora_B only")
            lora_A, lora_B, magnitude = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
            if lora_A.ndim != 2 or lora_B.ndim != 2 or not 0 < lora_A.shape[0] == lora_B.shape[1]:
                raise UserError(f"{path}: {name}: lora_A and lora_B do not fit together")
            if magnitude is not None and magnitude.shape != lora_B.shape[:1]:
                raise UserError(f"{path}: {name}: lora_magnitude_vector does not fit to lora_B")
            alpha = by_pattern(self.config.get("alpha_pattern") or {}, name, self.config["lora_alpha"])
            rank = lora_A.shape[0]
            scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
            yield memory_name(f"{name}.weight"), LayerUpdate(lora_A, lora_B, scaling, magnitude)


# How the names of parameters differ between memory and the hub's files, whose order transformers turned around in
# version 4.52. Adapters saved before that have the hub's names too.
_RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def memory_name(name: str) -> str:
    """A parameter's name in memory, from that or from its name in the hub's files."""
    new, old = next(((new, old) for new, old in _RENAMED if name.startswith(old)), ("", ""))
    return new + name.removeprefix(old)


def hub_name(name: str) -> str:
    """A parameter's name in the hub's files, from its name in memory."""
    new, old = next(((new, old) for new, old in _RENAMED if name.startswith(new)), ("", ""))
    return old + name.removeprefix(new)


def by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """peft's rule: a pattern holds for the layers whose name it matches at the end."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _check_kind(path: Path, config: dict[str, Any]) -> None:
    """Refuse adapters that `LayerUpdate.apply` would merge wrongly, kinds that peft invents later among them."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')!r}; supported is 'LORA'")
    for name, kind in (("base_model_name_or_path", str), ("lora_alpha", (int, float))):
        if not isinstance(config.get(name), kind):
            raise UserError(f"{path}: broken: {name} is {config.get(name)!r}")
    unsupported = [name for name, value in config.items() if value and name not in MERGEABLE_SETTINGS]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if set(config.get("modules_to_save") or ()) - WHOLE_MODULES.keys():
        unsupported.append("modules_to_save")
    # Initialisations by name, such as PiSSA's, change the base's weights when training starts.
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        unsupported.append("init_lora_weights")
    if unsupported:
        settings = ", ".join(f"{name} {config.get(name)!r}" for name in unsupported)
        raise UserError(f"{path}: an adapter with {settings} cannot be merged")
