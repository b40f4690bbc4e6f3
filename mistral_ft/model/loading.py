"""Loading models: which architectures there are, and whether a folder holds one of them."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    Ministral3ForCausalLM,
    Mistral3ForConditionalGeneration,
    MistralForCausalLM,
    PreTrainedModel,
)

from mistral_ft.distributed import world_size
from mistral_ft.errors import UserError
from mistral_ft.files import read_settings
from mistral_ft.model.attention import PACKED
from mistral_ft.model.fp8 import round_layers
from mistral_ft.model.rounding import FOUR_BITS, FP8, check_rounding, is_four_bit
from mistral_ft.model.vision import PageEncoder, PageLlavaModel, PageMistral3Model

# By model_type of config.json: the class, and for models with a vision tower that of their core with our page encoder.
ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], type[PageEncoder] | None]] = {
    "mistral3": (Mistral3ForConditionalGeneration, PageMistral3Model),
    "llava": (LlavaForConditionalGeneration, PageLlavaModel),
    "mistral": (MistralForCausalLM, None),
    "ministral3": (Ministral3ForCausalLM, None),
}
# What the parts of a model with a vision tower may be.
TEXT_MODELS, VISION_MODELS = ("mistral", "ministral3"), ("pixtral",)


def text_model(model: PreTrainedModel) -> Any:
    """The part with the text layers: the whole core, or beside a vision tower the language model."""
    return getattr(model.model, "language_model", model.model)


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
    quantization: dict[str, Any] = {}
    if rounding == FP8 and is_four_bit(config):
        raise UserError(f"--base_dtype fp8: {folder} holds 4-bit weights only; name the bf16 model they are from")
    check_rounding(FOUR_BITS if is_four_bit(config) else rounding, device)
    if rounding == FOUR_BITS and not is_four_bit(config):
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
        )  # fmt: skip
    from_pretrained: Any = model_class.from_pretrained
    try:
        model, report = from_pretrained(
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
