"""Random adapters of the embedded base, one for each variant that can be merged."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from mistral_ft.model.adapter import PROJECTOR, TEXT_LAYERS, VISION_LAYERS
from mistral_ft.model.loading import load_base
from tests.conftest import TINY

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "vision": {"target_modules": f"{TEXT_LAYERS}|{VISION_LAYERS}"},
    "projector": {"target_modules": f"{TEXT_LAYERS}|{PROJECTOR}"},
    "patterns": {
        "rank_pattern": {"layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"self_attn.q_proj": 9, "layers.0.*": 3},
    },
    "modules_to_save": {"modules_to_save": ["multi_modal_projector"]},
    "dora, all parts, rsLoRA": {
        "use_dora": True,
        "use_rslora": True,
        "target_modules": f"{TEXT_LAYERS}|{VISION_LAYERS}|{PROJECTOR}",
    },
}


def make_adapter(folder: Path, base: Path = TINY, **settings) -> Path:
    """Save an adapter with random values, made by peft with the given LoraConfig settings."""
    torch.manual_seed(1)
    model = get_peft_model(
        load_base(base, torch.device("cpu")),
        LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TEXT_LAYERS, **settings}),
    )
    for name, parameter in model.named_parameters():
        if "magnitude" in name or "modules_to_save" in name:
            parameter.data *= 1.5
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder, by key."""
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}
