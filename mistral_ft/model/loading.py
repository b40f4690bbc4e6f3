"""Loading models, and a vision path that costs what the pages cost."""

import importlib.util
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    Ministral3ForCausalLM,
    Mistral3ForConditionalGeneration,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.models.mistral3.modeling_mistral3 import Mistral3Model
from transformers.utils import logging

from mistral_ft.distributed import gather, rank, world_size
from mistral_ft.errors import UserError
from mistral_ft.files import read_settings
from mistral_ft.model.adapter import TEXT_LAYERS
from mistral_ft.model.attention import PACKED
from mistral_ft.model.fp8 import round_layers
from mistral_ft.model.gpus import ON_CPU, check_generation, other_card, use_gpu
from mistral_ft.training.arguments import FOUR_BITS, FP8

# Patches that go through the vision tower at once: about three full pages. More make it no faster and cost memory.
MAX_TOWER_PATCHES = 32768
# Memory beside the weights, as a share of them, without which not even the shortest record can be computed.
SPARE_SHARE = 0.02
# GiB of weights in bf16 up to which a CPU is of use where there is a card.
MOST_ON_CPU = 2


class PageEncoder:
    """Mix-in for models with a Pixtral vision tower: images never see each other in it.

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
        patch, merge = self.vision_tower.patch_size, merge_size(self.config)
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
        merge, projector = merge_size(self.config), self.multi_modal_projector
        with _grad_if_trained(self.vision_tower):
            hidden = self._run_tower(pixel_values, grids)
        with _grad_if_trained(self.vision_tower, projector):
            if hasattr(projector, "patch_merger"):  # Pixtral-12B has none
                # The projector without its PatchMerger, which sorts patches into cells one image at a time.
                cells = projector.norm(hidden).unflatten(0, (-1, merge**2)).transpose(1, 2).flatten(1)
                hidden = projector.patch_merger.merging_layer(cells)
            return projector.linear_2(projector.act(projector.linear_1(hidden)))

    def _run_tower(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """PixtralVisionModel.forward on patches that are cut out already: (patches, hidden size)."""
        tower = self.vision_tower
        weight = tower.patch_conv.weight  # a convolution whose stride is its kernel: one product per patch
        hidden = tower.ln_pre(F.linear(pixel_values.to(weight.dtype), weight.flatten(1)))[None]
        positions = torch.cat([patch_positions(*grid, merge_size(self.config)) for grid in grids])
        bounds = [0, *accumulate(rows * columns for rows, columns in grids)]
        rotary = tower.patch_positional_embedding(hidden, positions.to(hidden.device))
        packed = {
            "cu_seq_lens": torch.tensor(bounds, dtype=torch.int32, device=hidden.device),
            "max_length": max(rows * columns for rows, columns in grids),
        }
        for layer in tower.transformer.layers:
            hidden = layer(hidden, None, position_embeddings=rotary, **packed)
        return hidden[0]


class PageMistral3Model(PageEncoder, Mistral3Model):
    """Small 3.1 and 3.2, Magistral and Devstral with vision, Ministral 3."""


class PageLlavaModel(PageEncoder, LlavaModel):
    """Pixtral-12B."""


# By model_type of config.json: the class, and for models with a vision tower that of their core with our page encoder.
ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], type[PageEncoder] | None]] = {
    "mistral3": (Mistral3ForConditionalGeneration, PageMistral3Model),
    "llava": (LlavaForConditionalGeneration, PageLlavaModel),
    "mistral": (MistralForCausalLM, None),
    "ministral3": (Ministral3ForCausalLM, None),
}
# What the parts of a model with a vision tower may be.
TEXT_MODELS, VISION_MODELS = ("mistral", "ministral3"), ("pixtral",)


def merge_size(config: Any) -> int:
    """Patches along the edge of an image token's cell."""
    return getattr(config, "spatial_merge_size", 1)


def text_model(model: PreTrainedModel) -> nn.Module:
    """The part with the text layers: the whole core, or beside a vision tower the language model."""
    return getattr(model.model, "language_model", model.model)


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
    folder: str | os.PathLike, device: torch.device, sharded: bool = False, rounding: str | None = None
) -> PreTrainedModel:
    """Load a base or merged model: bf16 on a GPU, where it goes without a copy in RAM, fp32 on a CPU.

    Args:
        sharded: leave each of several processes a share of the text layers; the GPU never holds more than that and
            one whole layer.
        rounding: what to round the text layers' weights to: FOUR_BITS, FP8 or nothing. To 4 bits as QLoRA does
            (Dettmers et al. 2023): NF4 in blocks of 64 with scales that are rounded to 8 bits themselves, 0.52 bytes a
            weight; products are made in bf16. To FP8: 1 byte a weight, and products are made in it (see `FP8Linear`);
            the GPU never holds more than that and one whole layer.

    Raises:
        UserError: if the folder holds no model of `ARCHITECTURES`, or lacks weights that the model needs.
    """
    folder = Path(folder)
    config = check_model_folder(folder)
    model_class, page_class = ARCHITECTURES[config["model_type"]]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    quantization = {}
    if rounding == FP8 and is_four_bit(config):
        raise UserError(f"--base_dtype fp8: {folder} holds 4-bit weights only; name the bf16 model they are from")
    check_rounding(FOUR_BITS if is_four_bit(config) else rounding, device)
    if rounding == FOUR_BITS and not is_four_bit(config):
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
        )  # fmt: skip
    try:
        model, report = model_class.from_pretrained(
            folder,
            dtype=dtype,
            # Elsewhere the weights stay in their files, mapped into memory, until their layer has its turn.
            device_map={"": device} if device.type == "cuda" and not sharded and rounding != FP8 else None,
            **quantization,
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
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes would repack 4-bit weights at the first product outside of training: it
        # takes only some shapes, rounds products to bf16, and has no gradient when training goes on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if page_class:
        # It adds methods only. A subclass of the whole would not do: transformers finds the key mapping by class name.
        model.model.__class__ = page_class
        model.config.vision_config._attn_implementation = PACKED
    if sharded:
        shard_layers(model, device)
    if rounding == FP8:
        round_layers(text_model(model).layers, device)
        model.to(device)
    return model


def shard_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Move a frozen model to the device, of each text layer this process's share (FSDP2).

    Layers are made whole for the moment they run, in forward and in backward. The text layers are 93 % of the 24B;
    embeddings, head, vision tower and projector stay whole. An adapter that is added later is whole too, so that it is
    saved, resumed and optimised as on one GPU. (accelerate's FSDP would turn the base to fp32 and shard the adapter.)
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    text = text_model(model)
    mesh = init_device_mesh(device.type, (world_size(),))
    model.requires_grad_(False)
    for layer in text.layers:
        fully_shard(layer.to(device), mesh=mesh)
    # The root, which has the next layer fetched while one runs.
    fully_shard(text, mesh=mesh, ignored_params={*text.embed_tokens.parameters(), *text.norm.parameters()})
    for module in (text.embed_tokens, text.norm, text.rotary_emb, model.lm_head):
        module.to(device)
    if text is not model.model:
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


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Refuse what is no Mistral model folder, before anything slow starts.

    Returns:
        What config.json says.

    Raises:
        UserError: what is missing or different.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: missing, so {folder} is no model folder")
    config = read_settings(path)
    kind = config.get("model_type")
    if kind == "mixtral":
        raise UserError(f"{path}: Mixtral's experts are not linear layers, which is all that an adapter is made for")
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: model_type is {kind!r}; supported are {', '.join(ARCHITECTURES)}")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and not is_four_bit(config):
        raise UserError(f"{path}: its weights are quantized ({method}); take the bf16 model they are from")
    if ARCHITECTURES[kind][1] is None:
        return config
    for part, kinds in (("text_config", TEXT_MODELS), ("vision_config", VISION_MODELS)):
        if not isinstance(config.get(part), dict):
            raise UserError(f"{path}: broken: no {part}")
        if config[part].get("model_type", kinds[0]) not in kinds:
            raise UserError(f"{path}: {part} is of type {config[part]['model_type']!r}; supported: {', '.join(kinds)}")
    if config.get("vision_feature_layer", -1) != -1:
        raise UserError(f"{path}: vision_feature_layer is {config['vision_feature_layer']}; supported is -1, the last")
    if kind == "llava" and config.get("vision_feature_select_strategy") != "full":
        raise UserError(f"{path}: vision_feature_select_strategy is not 'full', as Pixtral has it")
    return config


def is_four_bit(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a 4-bit copy made by bitsandbytes."""
    quantization = config.get("quantization_config") or {}
    return quantization.get("quant_method") == "bitsandbytes" and bool(quantization.get("load_in_4bit"))


def check_rounding(rounding: str | None, device: torch.device) -> None:
    """Raises UserError if weights cannot be rounded so here."""
    # Few need the package.
    if rounding == FOUR_BITS and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("4-bit weights need bitsandbytes: pip install -r requirements-4bit.txt")
    # Compute capability 8.9 is Ada's; a CPU computes such products too.
    if rounding == FP8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--base_dtype fp8 needs a GPU of the Ada or Hopper generation or a later one; this is {name}")


def weight_bytes(folder: Path, rounding: str | None = None, processes: int = 1) -> float:
    """Bytes of a model's weights on a GPU, from its config.json alone.

    Args:
        rounding: what the text layers' weights are rounded to.
        processes: how many share the text layers, as `shard_layers` does it. Each also holds one layer whole.

    Raises:
        UserError: if no model can be made of the config.json.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = ARCHITECTURES[config.model_type][0](config)
    except Exception as error:  # transformers fails in many ways on a config.json that does not fit together
        raise UserError(f"{folder / 'config.json'}: broken: {(str(error).splitlines() or ['?'])[0]}") from error
    # Rounded weights with their scales, and the adapter beside them in fp32: together at most so many bytes a weight.
    rounded = {FOUR_BITS: 0.55, FP8: 1.05, None: 2}[rounding]
    weights = sum(
        p.numel() * (rounded if re.fullmatch(rf"({TEXT_LAYERS})\.weight", name) else 2)
        for name, p in model.named_parameters()
    )
    if processes > 1:
        layers = [sum(2 * p.numel() for p in layer.parameters()) for layer in text_model(model).layers]
        weights -= sum(layers) * (1 - 1 / processes) - max(layers)
    return weights


def check_size(
    name: str,
    folder: Path,
    device: torch.device,
    rounding: str | None = None,
    processes: int = 1,
    smaller: str | None = None,
    use_cpu: bool = False,
) -> None:
    """Refuse a model that is too big for the device, before its weights are downloaded or read.

    On a CPU, name a card that is left unused.

    Args:
        name: what the user calls the model.
        folder: of the model; only its config.json is read.
        rounding: what the text layers' weights are rounded to.
        processes: how many share the text layers.
        smaller: the flag that has the step keep the weights in 4 bits, if it has one.
        use_cpu: whether the user asked for the CPU.

    Raises:
        UserError: what there is, what is needed, and what to do.
    """
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        needed = weight_bytes(folder, rounding, processes)
        rounded = weight_bytes(folder, FOUR_BITS) if smaller else None
        free, limited = limit_gib(device) * 2**30, torch.cuda.get_per_process_memory_fraction(device) < 1
        if problem := too_big(card.name, free, card.total_memory, limited, needed, smaller, rounded):
            kind = f"in {rounding or 'bf16'}" + (f", shared by {processes} processes," if processes > 1 else "")
            raise UserError(f"{name} {kind} {problem}")
    elif not use_cpu and (reason := other_card()):
        gib = weight_bytes(folder) / 2**30
        if gib > MOST_ON_CPU:
            raise UserError(f"{reason}, and {name} with its {gib:.1f} GiB of weights is too big for the CPU; {ON_CPU}")
        if rank() == 0:
            print(f"{reason}: using the CPU", file=sys.stderr)


def too_big(
    card: str,
    free: float,
    total: float,
    limited: bool,
    needed: float,
    smaller: str | None = None,
    rounded: float | None = None,
) -> str | None:
    """Why weights do not go onto a card, and what to do, as the end of a sentence that begins with the model; or None.

    Args:
        card: its name.
        free: bytes that may be used of its `total`.
        limited: whether --gpu_memory_gib says so.
        needed: bytes of the weights.
        smaller: the flag for 4 bits, with which they have `rounded` bytes.
    """

    def fits(weights: float, there: float) -> bool:
        return weights * (1 + SPARE_SHARE) <= there

    if fits(needed, free):
        return None
    line = f"takes {needed / 2**30:.1f} GiB for its weights alone, and {card} has {free / 2**30:.1f} GiB free"
    way = "take a larger card"
    if fits(needed, total):
        line += f" of {total / 2**30:.1f}"
        way = "raise --gpu_memory_gib" if limited else "end the other programs on it (nvidia-smi shows them)"
    return f"{line}: {way}" + (f", or {smaller} (docs/recipes.md)" if smaller and fits(rounded, free) else "")


def pick_device(gpu_memory_gib: float | None = None, use_cpu: bool = False) -> torch.device:
    """The first GPU, else the CPU.

    Args:
        use_cpu: take the CPU whatever there is.
        gpu_memory_gib: the memory to get by with, as on a smaller card; None takes all there is.

    Raises:
        UserError: if there is a card that torch cannot use, the card has less memory than that, or there is no GPU to
            limit.
    """
    if not use_gpu(use_cpu):
        if gpu_memory_gib is not None:
            raise UserError("--gpu_memory_gib: there is no GPU here to limit")
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    check_generation(device.index)
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
