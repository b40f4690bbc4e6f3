"""Bases rounded to FP8: what is rounded, how products are made, that an adapter learns on it, what becomes of it."""

import json

import pytest
import torch
from torch import nn

from mistral_ft.errors import UserError
from mistral_ft.model.adapter import Adapter
from mistral_ft.model.fp8 import E4M3, FP8Linear, round_layers, round_rows
from mistral_ft.model.layers import LayerRunner, LoraLinear, Seeds
from mistral_ft.model.loading import load_base
from mistral_ft.model.rounding import FP8, check_rounding
from mistral_ft.prediction.trained_model import ModelFolders
from mistral_ft.training.arguments import LoraArguments
from mistral_ft.training.new_adapter import add_adapter
from tests.conftest import TINY, read_rows
from tests.helpers.lora_layers import by_peft_and_by_us

CPU = torch.device("cpu")


def make_linear() -> tuple[nn.Linear, FP8Linear]:
    """A layer as it is, and rounded."""
    torch.manual_seed(0)
    plain, rounded = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
    rounded.load_state_dict(plain.state_dict())
    round_layers(nn.ModuleList([nn.Sequential(rounded)]), CPU)
    return plain, rounded


def test_each_row_is_scaled_so_that_its_largest_number_is_the_largest_of_fp8():
    rounded, scale = round_rows(torch.tensor([[896.0, -2.0, 0.7, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]]))
    assert scale[0].item() == 2
    # 3 bits of mantissa: 0.35 lies between 0.34375 and 0.375, 4 * 448 / 7 / 4 between 208 and 224 …
    assert rounded.float()[0].tolist() == [448, -1, 0.34375, 0]
    assert rounded.float()[1].tolist() == [0, 0, 0, 0]
    assert rounded.float()[2].tolist() == [112, 224, 320, 448]  # 336 lies in the middle of 320 and 352: to even
    assert scale[2].item() == pytest.approx(4 / 448)


def test_products_are_those_of_the_rounded_numbers():
    plain, rounded = make_linear()
    x = torch.randn(2, 5, 32, requires_grad=True)
    y, exact = rounded(x), plain(x)
    assert y.shape == (2, 5, 48)
    (numbers, scale), (weight, weight_scale) = (round_rows(matrix) for matrix in (x[1].detach(), plain.weight.detach()))
    expected = (numbers.double() * scale) @ (weight.double() * weight_scale).t()
    torch.testing.assert_close(y[1].double(), expected, atol=1e-5, rtol=1e-5)
    error = (y - exact).norm() / exact.norm()
    assert 0.01 < error < 0.06

    g = torch.randn(2, 5, 48)
    y.backward(g)
    numbers, scale = round_rows(g[1] * weight_scale.t())
    expected = (numbers.double() * scale) @ weight.double()
    torch.testing.assert_close(x.grad[1].double(), expected, atol=1e-5, rtol=1e-5)
    assert rounded.weight.grad is None
    assert (rounded.weight.dtype, rounded.weight.element_size()) == (torch.uint8, 1)
    assert torch.equal(rounded.weight.view(E4M3).float(), weight.float())


def test_the_text_layers_and_nothing_else_are_rounded():
    model, exact = load_base(TINY, CPU, rounding=FP8), load_base(TINY, CPU)
    rounded = {name for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    layers = {name for name, m in exact.named_modules() if isinstance(m, nn.Linear) and "language_model.layers" in name}
    assert rounded == layers
    assert len(rounded) == 28
    others = [n for n, p in model.named_parameters() if n.rpartition(".")[0] not in rounded]
    assert {model.get_parameter(name).dtype for name in others} == {torch.float32}
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, exact(input_ids=ids).logits
    assert 0.005 < (found - expected).norm() / expected.norm() < 0.2


def test_our_lora_layer_gives_what_peft_gives_and_its_matrices_are_not_rounded():
    torch.manual_seed(0)
    model = add_adapter(load_base(TINY, CPU, rounding=FP8), LoraArguments(lora_dropout=0), "base")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    first = next(p for name, p in trained.items() if "lora_A" in name)
    assert not torch.equal(first, first.to(E4M3).float())
    (expected, gradients), (found, own) = by_peft_and_by_us(model, torch.arange(20, 40)[None])
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 28
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for name, gradient in gradients.items():
        similarity = torch.nn.functional.cosine_similarity(own[name].flatten(), gradient.flatten(), dim=0)
        assert similarity > 0.999, name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.slow
def test_compiled_and_computed_twice_gradients_are_the_same():
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = add_adapter(load_base(TINY, CPU, rounding=FP8), LoraArguments(lora_dropout=0), "base")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        Seeds(model)
        runner = LayerRunner(model.get_base_model().model.language_model.layers, compiled)
        runner.recomputed = 2
        logits = model(input_ids=torch.arange(20, 84)[None], use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_it_trains_predicts_and_merges(few_pages, train_tiny, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train_tiny(few_pages, "--base_dtype", "fp8", "--max_steps", 12)
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0] / 2
    assert Adapter(run).rounding == "FP8"
    assert "| base while training | text layers rounded to FP8 |" in (run / "README.md").read_text()

    answers, sums = {}, {}
    for name, model, flags in (
        ("as trained", run, []),
        ("in FP8", run, ["--base_dtype", "fp8"]),
        ("merged in memory", run, ["--base_dtype", "bf16"]),
        ("base", TINY, ["--base_dtype", "fp8"]),
    ):
        code, _, err = run_cli("predict", few_pages, model, "-o", f"{name}.jsonl", "--max_new_tokens", 8, *flags)
        assert code == 0, err
        rows = read_rows(tmp_path / f"{name}.jsonl")
        answers[name], sums[name] = [r["actual"] for r in rows], [r["confidence"]["sum"] for r in rows]
    assert (answers["as trained"], sums["as trained"]) == (answers["in FP8"], sums["in FP8"])
    assert sums["as trained"] != sums["merged in memory"]
    assert answers["as trained"] != answers["base"]

    code, out, err = run_cli("merge_lora_weights", run, "merged")
    assert code == 0, err
    assert "(rounded to FP8) and has learned to make up for that model's rounding" in out
    code, _, err = run_cli("predict", few_pages, "merged", "-o", "merged.jsonl", "--max_new_tokens", 8)
    assert code == 0, err
    assert [r["actual"] for r in read_rows(tmp_path / "merged.jsonl")] == answers["merged in memory"]


def test_predict_runs_the_adapter_on_the_rounded_base(few_pages, train_tiny, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train_tiny(few_pages, "--base_dtype", "fp8", "--max_steps", 4)
    code, _, err = run_cli("predict", few_pages, run, "-o", "one.jsonl", "--max_new_tokens", 1)
    assert code == 0, err
    from mistral_ft.data.prompt.encoder import PromptEncoder

    last, best = read_rows(tmp_path / "one.jsonl")[4], {}
    ids = torch.tensor([PromptEncoder.from_folder(TINY).encode(last["messages"])[0]])
    for rounding in (FP8, None):
        model = Adapter(run).put_on(load_base(TINY, CPU, rounding=rounding)).eval()
        with torch.no_grad():
            best[rounding] = model(input_ids=ids).logits[0, -1].log_softmax(-1).max().item()
    assert last["confidence"]["sum"] == pytest.approx(best[FP8], abs=1e-3)
    # That it is not to be in 4 bits does not make it bf16.
    assert ModelFolders.find(str(run), four_bit=False).rounding == FP8
    assert abs(best[FP8] - best[None]) > 2e-3


def test_a_run_is_not_continued_on_another_rounding(few_pages, train_tiny, run_cli, tmp_path):
    run = train_tiny(few_pages, "--max_steps", 2, "--save_steps", 1)
    code, _, err = run_cli(
        "train", "--dataset", few_pages, "--output_dir", tmp_path / "output", "--learning_rate", "2e-3",
        "--model_id", TINY, "--lora_dropout", "0", "--max_steps", 2, "--save_steps", 1,
        "--resume_from_checkpoint", run, "--base_dtype", "fp8",
    )  # fmt: skip
    assert (code, "cannot be continued with another --load_in_4bit or --base_dtype" in err) == (2, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load_in_4bit", "True"], "--base_dtype fp8 and --load_in_4bit True exclude each other"),
        (["--use_dora", "True"], "--use_dora True needs the weights themselves, not --base_dtype fp8"),
        (["--base_dtype", "int8"], "invalid choice: 'int8' (choose from 'bf16', 'fp8')"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, few_pages, run_cli):
    code, _, err = run_cli("train", "--dataset", few_pages, "--model_id", TINY, "--base_dtype", "fp8", *flags)
    assert (code, message in err) == (2, True), err


def test_predict_refuses_both_roundings(few_pages, run_cli):
    code, _, err = run_cli("predict", few_pages, TINY, "--base_dtype", "fp8", "--load_in_4bit")
    assert (code, "--load_in_4bit and --base_dtype exclude each other" in err) == (2, True)


def test_a_gpu_without_fp8_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="Ada or Hopper generation or a later one; this is NVIDIA A100-SXM4-80GB"):
        check_rounding(FP8, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_rounding(FP8, torch.device("cuda"))


@pytest.mark.parametrize("linear", [nn.Linear(24, 32, bias=False), nn.Linear(32, 40, bias=False), nn.Linear(32, 32)])
def test_layers_that_gpus_cannot_multiply_in_fp8_are_refused(linear):
    with pytest.raises(UserError, match="0 has a bias, or a shape that is no multiple of 16"):
        round_layers(nn.ModuleList([nn.Sequential(linear)]), CPU)
