"""Bases rounded to 4 bits: what is rounded, that an adapter learns on it, and what becomes of it afterwards."""

import json
import shutil

import pytest
import torch

pytest.importorskip("bitsandbytes")
pytest.importorskip("mistral_common")  # not to be had for Python 3.10
pytest.importorskip("sentencepiece")

from bitsandbytes.nn import Linear4bit, modules
from torch import nn
from transformers.models.mistral3.modeling_mistral3 import Mistral3Model

from mistral_ft.model import rounding as rounding_module
from mistral_ft.model.adapter import Adapter
from mistral_ft.model.layers import LoraLinear
from mistral_ft.model.loading import load_base
from mistral_ft.model.rounding import FOUR_BITS
from mistral_ft.training.arguments import LoraArguments
from mistral_ft.training.new_adapter import add_adapter
from tests.conftest import read_rows
from tests.helpers.lora_layers import by_peft_and_by_us
from tests.helpers.tiny_models import write_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=[False, True], ids=["any CPU", "AVX512-BF16"])
def cpu(request, monkeypatch):
    """Each test on both kinds of CPU that bitsandbytes tells apart, whichever this one is."""
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base", "Small 3.2")


def test_the_text_layers_and_nothing_else_are_rounded(base):
    model, exact = load_base(base, CPU, rounding=FOUR_BITS), load_base(base, CPU)
    rounded = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    layers = {name for name, m in exact.named_modules() if isinstance(m, nn.Linear) and "language_model.layers" in name}
    assert rounded == layers
    assert len(rounded) == 14
    for name in sorted(rounded)[:3]:
        weight, state = model.get_submodule(name).weight, model.get_submodule(name).weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
        assert weight.numel() == exact.get_submodule(name).weight.numel() // 2  # two to a byte
    other = [n for n, p in model.named_parameters() if n.rpartition(".")[0] not in rounded]
    assert {model.get_parameter(name).dtype for name in other} == {torch.float32}


def test_evaluating_leaves_the_weights_as_they_are(base):
    """Repacked weights would give other products, and no gradients when training goes on."""
    model, ids = load_base(base, CPU, rounding=FOUR_BITS), torch.arange(5, 25)[None]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    found = []
    for _ in range(2):
        logits = model.train()(inputs_embeds=embedded).logits
        logits.logsumexp(-1).sum().backward()
        found.append((logits, embedded.grad))
        embedded.grad = None
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(input_ids=ids).logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)
    assert found[0][1].abs().min(dim=-1).values.sum() > 0
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in four_bit_layers(model))


def four_bit_layers(model: nn.Module) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def test_our_lora_layer_gives_what_peft_gives(base):
    ours = add_adapter(load_base(base, CPU, rounding=FOUR_BITS), LoraArguments(lora_dropout=0), "base")
    (expected, gradients), (found, own) = by_peft_and_by_us(ours, torch.arange(5, 25)[None])
    assert sum(isinstance(module, LoraLinear) for module in ours.modules()) == 14
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [[], ["--use_dora", "True", "--optim", "adamw_8bit"]])
def test_it_trains_predicts_and_merges(base, few_pages, more, train_tiny, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train_tiny(few_pages, "--model_id", base, "--load_in_4bit", "True", "--max_steps", 12, *more)
    losses = [
        line["loss"] for line in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in line
    ]
    assert losses[-1] < losses[0]
    assert Adapter(run).rounding == FOUR_BITS
    assert "rounded to 4 bits (QLoRA, NF4)" in (run / "README.md").read_text()

    answers = {}
    for name, model, flags in (
        ("4-bit", run, []), ("merged in memory", run, ["--no-load_in_4bit"]), ("base", base, ["--load_in_4bit"])
    ):  # fmt: skip
        code, _, err = run_cli("predict", few_pages, model, "-o", f"{name}.jsonl", "--max_new_tokens", 8, *flags)
        assert code == 0, err
        answers[name] = [r["actual"] for r in read_rows(tmp_path / f"{name}.jsonl")]
    code, out, err = run_cli("merge_lora_weights", run, "merged")
    assert code == 0, err
    assert "(rounded to 4 bits) and has learned to make up for that model's rounding" in out
    assert "rounded to 4 bits (QLoRA, NF4)" in (tmp_path / "merged/README.md").read_text()
    code, _, err = run_cli("predict", few_pages, "merged", "-o", "merged.jsonl", "--max_new_tokens", 8)
    assert code == 0, err
    assert [r["actual"] for r in read_rows(tmp_path / "merged.jsonl")] == answers["merged in memory"]
    assert answers["4-bit"] != answers["base"]


def test_the_adapter_is_run_on_the_rounded_base(base, few_pages, train_tiny, run_cli, tmp_path, monkeypatch):
    """predict's log-probabilities are those of peft on the 4-bit base, not those of the merged model."""
    monkeypatch.chdir(tmp_path)
    run = train_tiny(few_pages, "--model_id", base, "--load_in_4bit", "True", "--max_steps", 12)
    code, _, err = run_cli("predict", few_pages, run, "-o", "a.jsonl", "--max_new_tokens", 3)
    assert code == 0, err
    from mistral_ft.data.prompt.encoder import PromptEncoder

    encoder = PromptEncoder.from_folder(base)
    last = read_rows(tmp_path / "a.jsonl")[4]
    ids = torch.tensor([encoder.encode(last["messages"])[0]])
    best = {}
    for rounding in (FOUR_BITS, None):
        model = Adapter(run).put_on(load_base(base, CPU, rounding=rounding)).eval()
        with torch.no_grad():
            best[rounding] = model(input_ids=ids).logits[0, -1].log_softmax(-1).max().item()
    code, _, err = run_cli("predict", few_pages, run, "-o", "one.jsonl", "--max_new_tokens", 1)
    assert code == 0, err
    assert read_rows(tmp_path / "one.jsonl")[4]["confidence"]["sum"] == pytest.approx(best[FOUR_BITS], abs=1e-3)
    assert abs(best[FOUR_BITS] - best[None]) > 1e-2


def test_a_run_is_not_continued_on_another_rounding(base, few_pages, train_tiny, run_cli, tmp_path):
    flags = ("--model_id", base, "--max_steps", 2, "--save_steps", 1)
    run = train_tiny(few_pages, *flags)
    code, _, err = run_cli(
        "train", "--dataset", few_pages, "--output_dir", tmp_path / "output", "--learning_rate", "2e-3",
        "--lora_dropout", "0", *flags, "--resume_from_checkpoint", run, "--load_in_4bit", "True",
    )  # fmt: skip
    assert code == 2
    assert "cannot be continued with another --load_in_4bit" in err


def test_a_copy_in_4_bits_is_taken_as_it_is(base, few_pages, train_tiny, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_base(base, CPU, rounding=FOUR_BITS)
    model.model.__class__ = Mistral3Model  # as transformers knows it
    shutil.copytree(base, "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained("copy")
    for name, folder, flags in (("copy", "copy", []), ("base", base, ["--load_in_4bit"])):
        code, _, err = run_cli("predict", few_pages, folder, "-o", f"{name}.jsonl", "--max_new_tokens", 4, *flags)
        assert code == 0, err
    assert read_rows(tmp_path / "copy.jsonl") == read_rows(tmp_path / "base.jsonl")
    code, _, err = run_cli("predict", few_pages, "copy", "--no-load_in_4bit")
    assert (code, "copy holds 4-bit weights only; name the bf16 model they are from" in err) == (2, True)

    run = train_tiny(few_pages, "--model_id", "copy", "--max_steps", 2)
    code, _, err = run_cli("predict", few_pages, run, "-o", "run.jsonl", "--max_new_tokens", 4)
    assert code == 0, err
    code, _, err = run_cli("merge_lora_weights", run, "merged")
    assert (code, "its weights are quantized (bitsandbytes); give the bf16 model they are from" in err) == (2, True)
    code, out, err = run_cli("merge_lora_weights", run, "merged", "--base_model", base)
    assert code == 0, err
    assert "has learned to make up for that model's rounding" in out


def test_without_bitsandbytes_the_way_to_get_it_is_said(base, few_pages, run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(rounding_module.importlib.util, "find_spec", lambda name: None)
    code, _, err = run_cli("train", "--dataset", few_pages, "--model_id", base, "--load_in_4bit", "True")
    assert (code, err) == (2, "error: 4-bit weights need bitsandbytes: pip install -r requirements-4bit.txt\n")
    code, _, err = run_cli("predict", few_pages, base, "--load_in_4bit")
    assert (code, err) == (2, "error: 4-bit weights need bitsandbytes: pip install -r requirements-4bit.txt\n")


def test_other_roundings_are_refused(base, run_cli, few_pages, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "fp8").mkdir()
    (tmp_path / "fp8/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    code, _, err = run_cli("train", "--dataset", few_pages, "--model_id", tmp_path / "fp8")
    assert code == 2
    assert "its weights are quantized (fp8); take the bf16 model they are from" in err
