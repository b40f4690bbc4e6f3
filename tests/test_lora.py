"""Reading adapters, and what they do to a weight, held against peft's own merge."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mistral_ft.errors import UserError
from mistral_ft.lora import TEXT_LAYERS, Adapter
from mistral_ft.model import load_base
from tests.conftest import TINY

CPU = torch.device("cpu")


@pytest.fixture
def save_adapter(tmp_path):
    """Save a random adapter of the embedded base: save_adapter(**LoraConfig settings) -> folder."""

    def save(**settings):
        torch.manual_seed(1)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": TEXT_LAYERS} | settings
        model = get_peft_model(load_base(TINY, CPU), LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
            elif "magnitude" in name:
                parameter.data *= 1.5
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"layers.1.mlp.up_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 9, "layers.0.*": 3}},
        {"target_modules": r".*vision_tower.*\.q_proj|.*multi_modal_projector\.linear_1"},
    ],
)
def test_merge_equals_that_of_peft(save_adapter, settings):
    folder = save_adapter(**settings)
    expected = PeftModel.from_pretrained(load_base(TINY, CPU), folder).merge_and_unload().state_dict()
    model = load_base(TINY, CPU)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Adapter(folder).merge_into(model, torch.float32)
    changed = 0
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)
        changed += not torch.equal(tensor, base[name])
    assert changed == len(Adapter(folder).updates) > 0


def test_the_result_is_rounded_once_to_the_checkpoint_type(save_adapter):
    adapter = Adapter(save_adapter())
    model = load_base(TINY, CPU)
    name, update = next(iter(adapter.updates.items()))
    exact = model.get_submodule(name).weight + 1.5 * (update.lora_B @ update.lora_A)
    adapter.merge_into(model, torch.bfloat16)
    assert torch.equal(model.get_submodule(name).weight, exact.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; supported is 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] cannot be merged"),
        ({"bias": "all"}, "bias 'all' cannot be merged"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' cannot be merged"),
        ({"lora_alpha": "x"}, "broken: lora_alpha is 'x'"),
        ({"base_model_name_or_path": None}, "broken: base_model_name_or_path is None"),
        ({"something_new": True}, "something_new True cannot be merged"),
    ],
)
def test_adapters_that_would_be_merged_wrongly_are_refused(save_adapter, change, reason):
    folder = save_adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=reason):
        Adapter(folder)


def test_a_tensor_that_is_no_part_of_lora_is_refused(save_adapter):
    folder = save_adapter()
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights | {"lm_head.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds lm_head.weight, which is no part of a LoRA adapter"):
        Adapter(folder)


def test_half_a_pair_is_refused(save_adapter):
    folder = save_adapter()
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has lora_A or lora_B only"):
        Adapter(folder)


def test_values_that_are_no_numbers_are_refused(save_adapter):
    folder = save_adapter()
    weights = load_file(folder / "adapter_model.safetensors")
    weights[sorted(weights)[0]][0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds values that are no numbers; the training went wrong"):
        Adapter(folder)


def test_broken_and_missing_files_are_named(save_adapter, tmp_path):
    folder = save_adapter()
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:100])
    with pytest.raises(UserError, match=r"adapter_model.safetensors: broken file"):
        Adapter(folder)
    with pytest.raises(UserError, match=r"adapter_config.json: missing"):
        Adapter(tmp_path)


def test_another_models_adapter_is_refused(save_adapter):
    folder = save_adapter()
    weights = load_file(folder / "adapter_model.safetensors")
    other = {name.replace("layers.2", "layers.39"): tensor for name, tensor in weights.items()}
    save_file(other, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"the base has no layer model.language_model.layers.39.*another model's"):
        Adapter(folder).merge_into(load_base(TINY, CPU), torch.float32)
    wide = {name: torch.ones(4, 999) if "lora_A" in name else tensor for name, tensor in weights.items()}
    save_file(wide, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"is \(128, 999\) here but \(128, 384\) in the base"):
        Adapter(folder).merge_into(load_base(TINY, CPU), torch.float32)
