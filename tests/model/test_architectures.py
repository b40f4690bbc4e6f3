"""Every supported architecture, as a tiny random model: it trains, predicts and merges through the commands."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("mistral_common")  # not to be had for Python 3.10
pytest.importorskip("sentencepiece")

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mistral_ft.data.collators import TrainingCollator
from mistral_ft.data.dataset import RecordDataset
from mistral_ft.data.pages import open_image
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import read_records
from mistral_ft.model.loading import load_base
from mistral_ft.prediction.decoding import GreedyDecoder
from mistral_ft.training.preflight import take_over_layers
from tests.conftest import make_page, read_rows, row, write_jsonl
from tests.helpers.tiny_models import MODELS, write_model

CPU = torch.device("cpu")
WITH_VISION = {"Small 3.2", "Magistral", "Ministral 3", "Pixtral-12B"}


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def base(name, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base", name)


@pytest.fixture(scope="module")
def data(name, tmp_path_factory):
    """Records of several lengths; with pages where the model can see them."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        row(k, f"Decree {k + 20} on Salt", text=f"What is the title of document {k}? " * (1 + k % 3)) for k in range(6)
    ]
    rows[1]["messages"].insert(0, {"role": "system", "content": "Be exact."})
    if name in WITH_VISION:
        for k in range(1, 5):
            make_page(folder / f"{k}.png", k, (84, 56) if k % 2 else (56, 112))
            rows[k]["messages"][-1]["content"].append({"type": "image", "image": f"{k}.png"})
        rows[4]["messages"][-1]["content"].append({"type": "image", "image": "1.png"})
    return write_jsonl(folder / "data.jsonl", rows)


def reference_logits(base, dataset, number):
    """Logits of a whole record by transformers alone, with its own vision tower and attention."""
    vision = "vision_config" in json.loads((base / "config.json").read_text())
    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = kind.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    example = dataset[number]
    batch = {"input_ids": torch.tensor([example.input_ids])}
    if paths := dataset.records[number].image_paths:
        pages = [dataset.processor.fitter.pixels(open_image(path)) for path in paths]
        sizes = np.max([page.shape for page in pages], 0)
        padded = [
            np.pad(page, [(0, most - there) for most, there in zip(sizes, page.shape, strict=True)]) for page in pages
        ]
        batch |= {
            "pixel_values": torch.from_numpy(np.stack(padded)),
            "image_sizes": torch.tensor(example.image_sizes),
        }
    with torch.no_grad():
        return model(**batch).logits[0]


def test_packed_records_give_the_logits_of_transformers(base, data):
    processor = Processor.from_folder(base)
    dataset = RecordDataset(read_records([data]), processor)
    model = load_base(base, CPU).eval()
    model.get_base_model = lambda: model
    take_over_layers(model, compiled=False, packing=True)
    numbers = [4, 0, 2]
    batch = TrainingCollator(processor.encoder.control.pad, length=700)([[dataset[k] for k in numbers]])
    bounds = batch.cu_seq_lens.tolist()
    with torch.no_grad():
        logits = model.lm_head(model.model(**batch.model_inputs(), use_cache=False).last_hidden_state[0])
    for k, start, end in zip(numbers, bounds, bounds[1:], strict=False):
        torch.testing.assert_close(logits[start:end], reference_logits(base, dataset, k), atol=2e-4, rtol=1e-3)


def test_greedy_answers_are_those_of_transformers(base, data):
    processor = Processor.from_folder(base)
    dataset = RecordDataset(read_records([data]), processor, with_answers=False)
    decoder = GreedyDecoder(load_base(base, CPU).eval(), eos=-1)
    numbers = [4, 0, 2]
    prompts = [TrainingCollator(processor.encoder.control.pad)([[dataset[k] for k in numbers]])]
    answers, log_probs = decoder.decode(prompts, 12)
    for k, ids, probs in zip(numbers, answers, log_probs, strict=True):
        # Fed with the answer, transformers prefers the same tokens by as much.
        whole = RecordDataset(dataset.records, processor, with_answers=False)
        prompt = whole[k].input_ids
        whole.__class__ = type("Fed", (RecordDataset,), {"__getitem__": _with_ids(prompt + ids)})
        scores = reference_logits(base, whole, k)[len(prompt) - 1 : -1].log_softmax(-1)
        best = scores.max(-1)
        assert best.indices.tolist() == ids
        assert best.values.tolist() == pytest.approx(probs, abs=1e-3)


def _with_ids(ids):
    return lambda self, index: RecordDataset.__getitem__(self, index)._replace(input_ids=ids)


def test_it_trains_predicts_and_merges(name, base, data, train_tiny, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--vision_lora", "True", "--train_projector", "True"] if name in WITH_VISION else []
    run = train_tiny(
        data,
        "--model_id",
        base,
        "--max_steps",
        20,
        "--per_device_train_batch_size",
        6,
        "--learning_rate",
        "2e-2",
        *more,
    )
    losses = [
        line["loss"] for line in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in line
    ]
    assert losses[-1] < losses[0] - 0.5
    assert json.loads((run / "run.json").read_text())["prompt"]["template"].startswith(
        ("v1-", "v3-", "v7-", "v11-", "v13-")
    )

    code, _, err = run_cli("predict", data, run, "-o", "adapter.jsonl", "--max_new_tokens", 20)
    assert code == 0, err
    code, out, err = run_cli("merge_lora_weights", run, "merged", "--compare_on", data, "--limit", 2)
    assert code == 0, err
    assert "0 answers differ between the adapter unmerged and merged" in out
    code, _, err = run_cli("predict", data, "merged", "-o", "merged.jsonl", "--max_new_tokens", 20)
    assert code == 0, err
    adapter, merged = (read_rows(tmp_path / f"{kind}.jsonl") for kind in ("adapter", "merged"))
    assert [a["actual"] for a in adapter] == [m["actual"] for m in merged]
    code, _, err = run_cli("predict", data, base, "-o", "base.jsonl", "--max_new_tokens", 20)
    assert code == 0, err
    assert [b["actual"] for b in read_rows(tmp_path / "base.jsonl")] != [a["actual"] for a in adapter]

    kind = AutoModelForImageTextToText if name in WITH_VISION else AutoModelForCausalLM
    loaded, report = kind.from_pretrained("merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_beams_work_too(name, base, data, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli("predict", data, base, "--num_beams", 2, "--max_new_tokens", 5, "--limit", 3)
    assert code == 0, err
    assert len(read_rows(tmp_path / "base.jsonl")) == 3


def test_pages_for_a_model_without_eyes_are_refused(name, base, data, run_cli, tmp_path, monkeypatch):
    if name in WITH_VISION:
        return
    monkeypatch.chdir(tmp_path)
    make_page(tmp_path / "1.png", 1)
    rows = [row(0, "a"), row(1, "b", ["1.png"]), row(2, "c", ["1.png"])]
    write_jsonl(tmp_path / "pages.jsonl", rows)
    reason = "error: pages.jsonl:2: shows an image, but the model reads text only; leave it out, or take a model with"
    for command in (
        ["train", "--dataset", "pages.jsonl", "--model_id", base],
        ["predict", "pages.jsonl", base],
    ):
        code, _, err = run_cli(*command)
        assert (code, err[: len(reason)]) == (2, reason)
    code, out, _ = run_cli("validate_data", "pages.jsonl", "--model_id", base)
    assert (code, out.count("shows an image, but the model reads text only")) == (1, 2)
    code, _, err = run_cli("train", "--dataset", "pages.jsonl", "--model_id", base, "--vision_lora", "True")
    assert (code, "--vision_lora and --train_projector: " in err, "has no vision tower" in err) == (2, True, True)
    assert not (tmp_path / "output").exists() or not list((tmp_path / "output").iterdir())


def test_mixtral_is_refused(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "mixtral"}')
    write_jsonl(tmp_path / "data.jsonl", [row(0, "a")])
    code, _, err = run_cli("train", "--dataset", "data.jsonl", "--model_id", "base")
    assert code == 2
    assert "Mixtral's experts are not linear layers, which is all that an adapter is made for" in err
