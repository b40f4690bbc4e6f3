"""Loading models, and a vision path that costs what the pages cost."""

import math
import os
import sys
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import Mistral3ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.mistral3.modeling_mistral3 import Mistral3Model
from transformers.utils import logging

from mistral_ft.attention import PACKED
from mistral_ft.distributed import gather, world_size
from mistral_ft.errors import UserError
from mistral_ft.files import read_settings

# Patches that go through the vision tower at once: about three full pages. More make it no faster and cost memory.
MAX_TOWER_PATCHES = 32768


class PageMistral3Model(Mistral3Model):
    """Mistral3Model whose images never see each other in the vision tower.

    transformers joins all images of a batch into one sequence under a dense block mask: time and memory grow with the
    square of all patches together. Here they form one sequence whose attention knows where each begins. Only the last
    layer's output is kept, and parts that do not learn keep no graph.
    """

    def get_image_features(self, pixel_values, image_sizes, vision_feature_layer=None, **kwargs):
        """Encode images.

        Args:
            pixel_values: float of shape (patches, 3 * patch_size**2): the patches of all images as `images.to_patches`
                orders them.
            image_sizes: each image's (height, width) in pixels, as numbers or as an int tensor of shape (images, 2).

        Returns:
            An output whose `pooler_output` is a list of tensors of shape (tokens of the image, hidden size).
        """
        assert self.config.vision_feature_layer == -1, "load_base refuses other layers"
        patch, merge = self.vision_tower.patch_size, self.config.spatial_merge_size
        grids = [(height // patch, width // patch) for height, width in torch.as_tensor(image_sizes).tolist()]
        features: list[torch.Tensor] = []
        start = 0
        for some in _in_groups(grids, MAX_TOWER_PATCHES):
            count = sum(rows * columns for rows, columns in some)
            encoded = self._encode_patches(pixel_values[start : start + count], some)
            features += encoded.split([rows * columns // merge**2 for rows, columns in some])
            start += count
        return BaseModelOutputWithPooling(pooler_output=features)

    def _encode_patches(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """The patches of images of some (rows, columns) to features of shape (tokens, hidden size)."""
        merge, projector = self.config.spatial_merge_size, self.multi_modal_projector
        with _grad_if_trained(self.vision_tower):
            hidden = self._run_tower(pixel_values, grids)
        with _grad_if_trained(self.vision_tower, projector):
            # The projector without its PatchMerger, which sorts patches into cells one image at a time.
            cells = projector.norm(hidden).unflatten(0, (-1, merge**2)).transpose(1, 2).flatten(1)
            merged = projector.patch_merger.merging_layer(cells)
            return projector.linear_2(projector.act(projector.linear_1(merged)))

    def _run_tower(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """PixtralVisionModel.forward on patches that are cut out already: (patches, hidden size)."""
        tower = self.vision_tower
        weight = tower.patch_conv.weight  # a convolution whose stride is its kernel: one product per patch
        hidden = tower.ln_pre(F.linear(pixel_values.to(weight.dtype), weight.flatten(1)))[None]
        positions = torch.cat([patch_positions(*grid, self.config.spatial_merge_size) for grid in grids])
        bounds = [0, *accumulate(rows * columns for rows, columns in grids)]
        rotary = tower.patch_positional_embedding(hidden, positions.to(hidden.device))
        packed = {
            "cu_seq_lens": torch.tensor(bounds, dtype=torch.int32, device=hidden.device),
            "max_length": max(rows * columns for rows, columns in grids),
        }
        for layer in tower.transformer.layers:
            hidden = layer(hidden, None, position_embeddings=rotary, **packed)
        return hidden[0]


@lru_cache(maxsize=256)
def patch_positions(rows: int, columns: int, merge: int) -> torch.Tensor:
    """(row, column) of an image's patches in the order of `images.to_patches`: int64 of shape (rows * columns, 2)."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(rows, columns, 2)
    return grid.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2).reshape(-1, 2)


def _in_groups(grids: list[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Images in their order, as many at once as have `most` patches together, but always one."""
    some: list[tuple[int, int]] = []
    for rows, columns in grids:
        if some and sum(r * c for r, c in some) + rows * columns > most:
            yield some
            some = []
        some.append((rows, columns))
    yield some


def _grad_if_trained(*modules: nn.Module) -> torch.set_grad_enabled:
    trained = any(parameter.requires_grad for module in modules for parameter in module.parameters())
    return torch.set_grad_enabled(trained and torch.is_grad_enabled())


def load_base(
    folder: str | os.PathLike, device: torch.device, sharded: bool = False
) -> Mistral3ForConditionalGeneration:
    """Load a base or merged model: bf16 on a GPU, where it goes without a copy in RAM, fp32 on a CPU.

    Args:
        sharded: leave each of several processes a share of the text layers; the GPU never holds more than that and
            one whole layer.

    Raises:
        UserError: if the folder holds no Mistral3 model, or lacks weights that the model needs.
    """
    folder = Path(folder)
    check_model_folder(folder)
    try:
        model, report = Mistral3ForConditionalGeneration.from_pretrained(
            folder,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            device_map={"": device} if device.type == "cuda" and not sharded else None,
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
    model.config.vision_config._attn_implementation = PACKED
    if sharded:
        shard_layers(model, device)
    return model


def shard_layers(model: Mistral3ForConditionalGeneration, device: torch.device) -> None:
    """Move a frozen model to the device, of each text layer this process's share (FSDP2).

    Layers are made whole for the moment they run, in forward and in backward. The text layers are 93 % of the 24B;
    embeddings, head, vision tower and projector stay whole. An adapter that is added later is whole too, so that it is
    saved, resumed and optimised as on one GPU. (accelerate's FSDP would turn the base to fp32 and shard the adapter.)
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    text = model.model.language_model
    mesh = init_device_mesh(device.type, (world_size(),))
    model.requires_grad_(False)
    for layer in text.layers:
        fully_shard(layer.to(device), mesh=mesh)
    # The root, which has the next layer fetched while one runs.
    fully_shard(text, mesh=mesh, ignored_params={*text.embed_tokens.parameters(), *text.norm.parameters()})
    for module in (text.embed_tokens, text.norm, text.rotary_emb, model.lm_head):
        module.to(device)
    model.model.vision_tower.to(device)
    model.model.multi_modal_projector.to(device)


def held_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the model's parameters in this process, and of all of them."""
    held = whole = 0
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        held += local.numel() * local.element_size()
        whole += parameter.numel() * parameter.element_size()
    return held, whole


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


def limit_gib(device: torch.device) -> float:
    """GiB that torch may reserve: what is free, or what `pick_device` was told to get by with."""
    free, total = torch.cuda.mem_get_info(device)
    there = free + torch.cuda.memory_reserved(device)
    return min(there, torch.cuda.get_per_process_memory_fraction(device) * total) / 2**30


def print_peak_memory(device: torch.device) -> None:
    """Say how much memory torch had reserved on the GPU, at most, of several processes on each; nothing on a CPU."""
    if device.type == "cuda":
        peaks = gather(torch.cuda.max_memory_reserved(device) / 2**30)
        each = f" (by process: {', '.join(f'{peak:.1f}' for peak in peaks)})" if len(peaks) > 1 else ""
        print(f"Peak GPU memory {max(peaks):.1f} GiB{each}")


def quiet_libraries() -> None:
    """Keep the libraries' own chatter off the user's screen; their progress bars stay, on a terminal."""
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a page is said by file and line
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
