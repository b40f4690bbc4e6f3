"""Loading models, and a vision path that costs what the pages cost."""

import math
import os
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Mistral3ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.mistral3.modeling_mistral3 import Mistral3Model
from transformers.utils import logging

from mistral_ft.errors import UserError
from mistral_ft.files import read_settings

# Patches that go through the vision tower at once: about three full pages. More make it no faster and cost memory.
MAX_TOWER_PATCHES = 32768


class PageMistral3Model(Mistral3Model):
    """Mistral3Model whose images never see each other in the vision tower.

    transformers joins all images of a batch into one sequence under a dense block mask: time and memory grow with the
    square of all patches together. Here images of one size form a batch with no mask at all. Only the last layer's
    output is kept, and parts that do not learn keep no graph.
    """

    def get_image_features(self, pixel_values, image_sizes, vision_feature_layer=None, **kwargs):
        """Encode images.

        Args:
            pixel_values: float of shape (images, 3, height, width), padded on the right and below.
            image_sizes: int of shape (images, 2): each one's own (height, width) in pixels.

        Returns:
            An output whose `pooler_output` is a list of tensors of shape (tokens of the image, hidden size).
        """
        assert self.config.vision_feature_layer == -1, "load_base refuses other layers"
        groups = defaultdict(list)
        sizes = [tuple(size) for size in torch.as_tensor(image_sizes).tolist()]
        for index, size in enumerate(sizes):
            groups[size].append(index)
        features: list[torch.Tensor | None] = [None] * len(sizes)
        patch = self.vision_tower.patch_size
        for (height, width), indices in groups.items():
            at_once = max(1, MAX_TOWER_PATCHES // ((height // patch) * (width // patch)))
            for start in range(0, len(indices), at_once):
                chosen = indices[start : start + at_once]
                pages = self._encode_pages(pixel_values[chosen, :, :height, :width])
                for index, page in zip(chosen, pages, strict=True):
                    features[index] = page
        return BaseModelOutputWithPooling(pooler_output=features)

    def _encode_pages(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images of one size, (images, 3, height, width), to features of shape (images, tokens, hidden size)."""
        count, _, height, width = pixel_values.shape
        with _grad_if_trained(self.vision_tower):
            hidden = self._run_tower(pixel_values)
        with _grad_if_trained(self.vision_tower, self.multi_modal_projector):
            features = self.multi_modal_projector(hidden.flatten(0, 1), [(height, width)] * count)
        return features.unflatten(0, (count, -1))

    def _run_tower(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """PixtralVisionModel.forward without its mask, for images of one size: (images, patches, hidden size)."""
        tower = self.vision_tower
        patches = tower.patch_conv(pixel_values.to(tower.patch_conv.weight.dtype))
        rows, columns = patches.shape[-2:]
        hidden = tower.ln_pre(patches.flatten(2).transpose(1, 2))
        positions = torch.cartesian_prod(
            torch.arange(rows, device=hidden.device), torch.arange(columns, device=hidden.device)
        )
        rotary = tower.patch_positional_embedding(hidden, positions)
        return tower.transformer(
            hidden, attention_mask=None, position_embeddings=rotary, return_dict=True
        ).last_hidden_state


def _grad_if_trained(*modules: nn.Module) -> torch.set_grad_enabled:
    trained = any(parameter.requires_grad for module in modules for parameter in module.parameters())
    return torch.set_grad_enabled(trained and torch.is_grad_enabled())


def load_base(folder: str | os.PathLike, device: torch.device) -> Mistral3ForConditionalGeneration:
    """Load a base or merged model: bf16 on a GPU, where it goes without a copy in RAM, fp32 on a CPU.

    Raises:
        UserError: if the folder holds no Mistral3 model, or lacks weights that the model needs.
    """
    folder = Path(folder)
    check_model_folder(folder)
    try:
        model, report = Mistral3ForConditionalGeneration.from_pretrained(
            folder,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            device_map={"": device} if device.type == "cuda" else None,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
        )
    except torch.OutOfMemoryError:
        raise UserError(f"{folder}: the GPU's memory does not hold the weights") from None
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        # A folder whose files do not fit together fails in many ways inside transformers.
        first = (str(error).splitlines() or ["?"])[0]
        raise UserError(f"{folder}: cannot be loaded: {type(error).__name__}: {first}") from error
    for kind, what in (("missing_keys", "missing"), ("unexpected_keys", "left over"), ("mismatched_keys", "misshapen")):
        if report[kind]:
            example = min(map(str, report[kind]))
            raise UserError(f"{folder}: {len(report[kind])} weights are {what} for its config.json, such as {example}")
    # It adds methods only. A subclass of the whole would not do: transformers finds the key mapping by class name.
    model.model.__class__ = PageMistral3Model
    return model


def check_model_folder(folder: Path) -> None:
    """Refuse what is no Mistral3 model folder, before anything slow starts.

    Raises:
        UserError: what is missing or different.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: missing, so {folder} is no model folder")
    config = read_settings(path)
    if config.get("model_type") != "mistral3":
        raise UserError(f"{path}: model_type is {config.get('model_type')!r}; supported is 'mistral3'")
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise UserError(f"{path}: broken: no {part}")
    if config.get("vision_feature_layer", -1) != -1:
        raise UserError(f"{path}: vision_feature_layer is {config['vision_feature_layer']}; supported is -1, the last")


def pick_device(gpu_memory_gib: float | None = None, use_cpu: bool = False) -> torch.device:
    """The first GPU, else the CPU.

    Args:
        use_cpu: take the CPU whatever there is.
        gpu_memory_gib: the memory to get by with, as on a smaller card; None takes all there is.

    Raises:
        UserError: if the card has less than that, or there is no GPU to limit.
    """
    if use_cpu or not torch.cuda.is_available():
        if gpu_memory_gib is not None:
            raise UserError("--gpu_memory_gib: there is no GPU here to limit")
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    if gpu_memory_gib is not None:
        there = torch.cuda.get_device_properties(device).total_memory / 2**30
        if not 0 < gpu_memory_gib <= there:
            raise UserError(f"--gpu_memory_gib {gpu_memory_gib:g}: the card has {math.floor(there * 10) / 10} GiB")
        torch.cuda.set_per_process_memory_fraction(gpu_memory_gib / there, device)
    return device


def print_peak_memory(device: torch.device) -> None:
    """Say how much memory torch had reserved on the GPU, at most; nothing on a CPU."""
    if device.type == "cuda":
        print(f"Peak GPU memory {torch.cuda.max_memory_reserved(device) / 2**30:.1f} GiB")


def quiet_libraries() -> None:
    """Keep the libraries' own chatter off the user's screen; their progress bars stay, on a terminal."""
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a page is said by file and line
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
