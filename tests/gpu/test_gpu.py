"""What only a GPU does: its attention kernels, compiled layers, CUDA graphs, FP8, and how memory is planned.

./test.sh -m gpu      (about two minutes)
"""

import json
import re
import shutil
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, MistralConfig, MistralForCausalLM

from mistral_ft.data.collators import TrainingCollator
from mistral_ft.data.dataset import RecordDataset
from mistral_ft.data.pages import open_image
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import read_records
from mistral_ft.model.fp8 import round_layers
from mistral_ft.model.layers import LayerRunner, Seeds, set_up_compiler
from mistral_ft.model.loading import load_base
from mistral_ft.model.rounding import FP8
from mistral_ft.prediction.decoding import GreedyDecoder
from mistral_ft.training.arguments import LoraArguments
from mistral_ft.training.new_adapter import add_adapter
from mistral_ft.training.preflight import take_over_layers
from tests.conftest import TINY, make_page, read_rows, row, write_jsonl

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
]  # fmt: skip
CPU, GPU = torch.device("cpu"), torch.device("cuda")
WINDOW = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Records with and without pages, of several lengths."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for k in range(24):
        make_page(folder / f"{k}.png", k + 1, (84, 56) if k % 2 else (56, 112))
        images = [f"{k}.png"] if k % 3 else None
        rows.append(row(k, f"Decree {k + 20} on Salt", images, f"What is the title of document {k}? " * (1 + k % 4)))
    return write_jsonl(folder / "data.jsonl", rows)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rows = [row(k, f"Decree {k}", text="What does the long decree about salt say? " * (3 + k)) for k in range(4)]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A random model like Mistral-7B v0.1, which sees the last 16 tokens, with the embedded base's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "windowed"
    config = MistralConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=4096, sliding_window=WINDOW, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    MistralForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tekken.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def packed_logits(base, dataset, numbers) -> list[torch.Tensor]:
    """Logits of records that share a sequence, as training computes them on the GPU."""
    model = load_base(base, GPU).eval()
    model.get_base_model = lambda: model
    take_over_layers(model, compiled=False, packing=True)
    batch = TrainingCollator(dataset.processor.encoder.control.pad, length=1024)([[dataset[k] for k in numbers]])
    bounds = batch.cu_seq_lens.tolist()
    inputs = batch.to(GPU).model_inputs()
    with torch.no_grad():
        logits = model.lm_head(model.model(**inputs, use_cache=False).last_hidden_state[0])
    return [logits[start:end].float().cpu() for start, end in list(pairwise(bounds))[: len(numbers)]]


def reference_logits(base, dataset, number, dtype, device) -> torch.Tensor:
    """Logits of one record by transformers alone."""
    vision = "vision_config" in json.loads((base / "config.json").read_text())
    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = kind.from_pretrained(base, dtype=dtype, attn_implementation="eager").eval().to(device)
    example = dataset[number]
    batch = {"input_ids": torch.tensor([example.input_ids], device=device)}
    if paths := dataset.records[number].image_paths:
        pages = [torch.from_numpy(dataset.processor.fitter.pixels(open_image(path))) for path in paths]
        batch["pixel_values"] = torch.stack(pages).to(device, dtype)
        batch["image_sizes"] = torch.tensor(example.image_sizes, device=device)
    with torch.no_grad():
        return model(**batch).logits[0].float().cpu()


@pytest.mark.parametrize("kind", ["pages", "window"])
def test_packed_records_are_as_near_to_fp32_as_transformers_in_bf16(kind, data, texts, windowed):
    base, path = (TINY, data) if kind == "pages" else (windowed, texts)
    processor = Processor.from_folder(base)
    dataset, numbers = RecordDataset(read_records([path]), processor), [1, 0, 2]
    if kind == "window":
        assert min(len(dataset[k].input_ids) for k in numbers) > 2 * WINDOW
    for number, ours in zip(numbers, packed_logits(base, dataset, numbers), strict=True):
        exact = reference_logits(base, dataset, number, torch.float32, CPU)
        theirs = reference_logits(base, dataset, number, torch.bfloat16, GPU)
        assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()


def test_a_step_of_decoding_is_the_same_with_and_without_a_graph(data):
    processor = Processor.from_folder(TINY)
    dataset = RecordDataset(read_records([data]), processor, with_answers=False)
    prompts = [TrainingCollator(processor.encoder.control.pad)([[dataset[k] for k in range(8)]])]
    found = []
    for graphs in (True, False):
        decoder = GreedyDecoder(load_base(TINY, GPU).eval(), processor.encoder.control.eos, graphs)
        found.append(decoder.decode(prompts, 20))
        assert (decoder.graph is not None) == graphs
    assert found[0] == found[1]


@pytest.mark.parametrize("more", [[], ["--base_dtype", "fp8"]], ids=["bf16", "fp8"])
def test_it_plans_trains_evaluates_predicts_and_merges(more, data, train_tiny, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    run = train_tiny(
        data, "--max_steps", 30, "--eval_dataset", data, "--eval_steps", 15, "--eval_generate", 4, *more,
        "--vision_lora", "True", "--train_projector", "True", "--pack_length", 512,
    )  # fmt: skip
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < losses[0] / 3
    assert len(evaluated) == 2
    assert evaluated[1] < evaluated[0]

    for name, flags in (("auto", []), ("one", ["--batch_size", 1]), ("merged-in-memory", ["--base_dtype", "bf16"])):
        code, out, err = run_cli("predict", data, run, "-o", f"{name}.jsonl", "--max_new_tokens", 20, *flags)
        assert code == 0, err
        said.append(out)
    assert re.search(r"Peak GPU memory \d+\.\d GiB", said[0])
    code, _, err = run_cli("merge_lora_weights", run, "merged")
    assert code == 0, err
    code, _, err = run_cli("predict", data, "merged", "-o", "merged.jsonl", "--max_new_tokens", 20)
    assert code == 0, err
    answers = {name: [r["actual"] for r in read_rows(tmp_path / f"{name}.jsonl")] for name in ("auto", "one")}
    differing = sum(a != b for a, b in zip(*answers.values(), strict=True))
    assert differing <= 2  # of 24: bf16 rounds a batch of one in another order
    merged = [[r["actual"] for r in read_rows(tmp_path / f"{name}.jsonl")] for name in ("merged-in-memory", "merged")]
    assert merged[0] == merged[1]


def test_a_run_that_is_resumed_goes_on_where_it_was(data, train_tiny, run_cli, tmp_path):
    flags = ("--max_steps", 6, "--save_steps", 3, "--pack_length", 512)
    run = train_tiny(data, *flags)
    whole = json.loads((run / "trainer_state.json").read_text())["log_history"]
    shutil.rmtree(run / "checkpoint-6")
    code, _, err = run_cli(
        "train", "--model_id", TINY, "--dataset", data, "--output_dir", tmp_path / "output", "--learning_rate", "2e-3",
        "--lora_dropout", "0", *flags, "--resume_from_checkpoint", run,
    )  # fmt: skip
    assert code == 0, err
    again = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (whole, again)]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert len(losses[0]) == 6


def test_products_in_fp8_are_those_of_the_cpu_compiled_or_not():
    torch.manual_seed(0)
    weight, x, g = torch.randn(48, 64), torch.randn(3, 20, 64).bfloat16(), torch.randn(3, 20, 48).bfloat16()
    found = {}
    for name, device in (("cpu", CPU), ("gpu", GPU), ("compiled", GPU)):
        linear = torch.nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
        linear.weight.data.copy_(weight)
        round_layers(torch.nn.ModuleList([torch.nn.Sequential(linear)]), device)
        inputs = x.to(device, copy=True).requires_grad_()
        output = (torch.compile(linear.forward) if name == "compiled" else linear)(inputs)
        output.backward(g.to(device))
        found[name] = output.detach().float().cpu(), inputs.grad.float().cpu()
    for name in ("gpu", "compiled"):
        for ours, expected in zip(found[name], found["cpu"], strict=True):
            assert (ours - expected).norm() < 0.02 * expected.norm(), name


@pytest.mark.parametrize("rounding", [None, FP8])
def test_compiled_layers_have_the_gradients_of_those_that_are_not(rounding):
    set_up_compiler()
    gradients = []
    for compiled, recomputed in ((False, 0), (True, 0), (True, 4)):
        torch.manual_seed(0)
        model = add_adapter(load_base(TINY, GPU, rounding=rounding), LoraArguments(lora_dropout=0), "base")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        Seeds(model)
        runner = LayerRunner(model.get_base_model().model.language_model.layers, compiled)
        runner.recomputed = recomputed
        logits = model(input_ids=torch.arange(20, 148, device=GPU)[None], use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).float())
    for other in gradients[1:]:
        assert torch.nn.functional.cosine_similarity(gradients[0], other, dim=0) > 0.99


@pytest.mark.parametrize(
    ("gib", "message"),
    [("100000", "--gpu_memory_gib 100000: the card has"), ("0.01", "GiB free of ")],
)
def test_memory_that_is_not_there_is_one_line(gib, message, data, run_cli, tmp_path):
    try:
        code, _, err = run_cli(
            "train", "--model_id", TINY, "--dataset", data, "--output_dir", tmp_path, "--gpu_memory_gib", gib
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (code, message in err) == (2, True), err
