"""Reading adapters, and what they do to a weight, held against peft's own merge."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mistral_ft.errors import UserError
from mistral_ft.merging.merge import row_blocks
from mistral_ft.model.adapter import Adapter, LayerUpdate
from mistral_ft.model.loading import load_base
from tests.conftest import TINY
from tests.helpers.adapters import VARIANTS, make_adapter

CPU = torch.device("cpu")


@pytest.fixture
def save_adapter(tmp_path):
    return lambda **settings: make_adapter(tmp_path / "adapter", **settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_equals_that_of_peft_in_every_bit(save_adapter, variant):
    folder = save_adapter(**VARIANTS[variant])
    expected = PeftModel.from_pretrained(load_base(TINY, CPU), folder).merge_and_unload().state_dict()
    model = load_base(TINY, CPU)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Adapter(folder).merge_into(model, torch.float32)
    changed = 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        changed += not torch.equal(tensor, base[name])
    assert changed == len(Adapter(folder).updates) > 0


@pytest.mark.parametrize("rank", [1, 16, 300])
def test_rows_by_themselves_give_the_bits_of_the_whole(rank):
    torch.manual_seed(0)
    weight = torch.randn(2500, 3000).bfloat16()
    update = LayerUpdate(torch.randn(rank, 3000), torch.randn(2500, rank), 0.37, torch.rand(2500))
    whole = update.apply(weight)
    blocks = list(row_blocks(weight))
    assert [(rows.start, rows.stop) for rows in blocks] == [
        (0, 357), (357, 714), (714, 1071), (1071, 1428), (1428, 1785), (1785, 2142), (2142, 2500),
    ]  # fmt: skip
    for rows in blocks:
        assert torch.equal(update.apply(weight[rows], rows), whole[rows])


def test_the_result_is_rounded_once_to_the_checkpoint_type(save_adapter):
    adapter = Adapter(save_adapter())
    model = load_base(TINY, CPU)
    name, update = next(iter(adapter.updates.items()))
    exact = model.get_parameter(name) + 1.5 * (update.lora_B @ update.lora_A)
    adapter.merge_into(model, torch.bfloat16)
    assert torch.equal(model.get_parameter(name), exact.bfloat16().float())


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
    with pytest.raises(UserError, match=r"holds lm_head.weight, which is no part of an adapter that can be merged"):
        Adapter(folder)


def test_a_projector_that_is_promised_but_missing_is_refused(save_adapter):
    folder = save_adapter(modules_to_save=["multi_modal_projector"])
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "projector" not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds nothing for modules_to_save \['multi_modal_projector'\]"):
        Adapter(folder)


@pytest.mark.parametrize("variant", ["dora, all parts, rsLoRA", "modules_to_save"])
def test_names_from_before_transformers_4_52_are_understood(save_adapter, variant):
    folder = save_adapter(**VARIANTS[variant])
    new = Adapter(folder).updates
    weights = load_file(folder / "adapter_model.safetensors")
    old = {
        name.replace("model.model.language_model.", "model.language_model.model.")
        .replace("model.model.vision", "model.vision")
        .replace("model.model.multi", "model.multi"): tensor
        for name, tensor in weights.items()
    }
    assert not old.keys() & weights.keys()
    save_file(old, folder / "adapter_model.safetensors")
    assert Adapter(folder).updates.keys() == new.keys()
    twice = {name: tensor.clone() for name, tensor in (old | weights).items()}
    save_file(twice, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds two updates of model."):
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
    with pytest.raises(UserError, match=r"the base has no model.language_model.layers.39.*another model's"):
        Adapter(folder).merge_into(load_base(TINY, CPU), torch.float32)
    wide = {name: torch.ones(4, 999) if "lora_A" in name else tensor for name, tensor in weights.items()}
    save_file(wide, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"is \(256, 999\) here but \(256, 768\) in the base"):
        Adapter(folder).merge_into(load_base(TINY, CPU), torch.float32)
