"""The whole loop on the embedded base and pages of the sample: what is learned is answered, scored and merged."""

import json
import sys

import pytest
import torch
from peft import PeftModel
from PIL import Image

from dataset import make_dataset
from mistral_ft.data.collators import PromptCollator
from mistral_ft.data.dataset import RecordDataset
from mistral_ft.data.processor import Processor
from mistral_ft.data.prompt.encoder import PromptEncoder
from mistral_ft.data.records import read_records
from mistral_ft.merging import comparison as merge_comparison
from mistral_ft.model.adapter import Adapter
from mistral_ft.model.loading import load_base
from models.pretraining.pages import reserved
from tests.conftest import ROOT, TINY, read_rows, write_jsonl

IMAGES = ("--images_dir", ROOT / "dataset")
SAMPLE = {"train": 400, "test": 100, "train-invoices": 400, "test-invoices": 100, "test-reading": 100}


@pytest.mark.slow
def test_what_the_base_cannot_do_is_learned_from_pages_and_merged(train_tiny, run_cli, tmp_path, monkeypatch):
    files = {}
    for name, count in {"train": 120, "test": 24, "test-reading": 24}.items():
        files[name] = write_jsonl(tmp_path / f"{name}.jsonl", read_rows(ROOT / f"dataset/{name}.jsonl")[:count])
    rows = read_rows(files["test"])
    swapped = [row | {"messages": rows[(i + 1) % 24]["messages"]} for i, row in enumerate(rows)]
    files["swapped"] = write_jsonl(tmp_path / "swapped.jsonl", swapped)

    def hits(name, model):
        output = tmp_path / f"{name}-{model.name}.jsonl"
        assert run_cli("predict", files[name], model, "-o", output, "--max_new_tokens", 30, *IMAGES)[0] == 0
        return json.loads(run_cli("score", output, "--json")[1])["hits"]

    # The base reads, but does not know what is asked.
    assert hits("test-reading", TINY) >= 21
    assert hits("test", TINY) == 0
    run = train_tiny(
        files["train"], *IMAGES, "--learning_rate", "3e-3", "--num_train_epochs", 2, "--lr_scheduler_type", "cosine",
        "--per_device_train_batch_size", 4, "--lora_rank", 16, "--lora_alpha", 32, "--vision_lora", "True",
        "--train_projector", "True", "--save_strategy", "no",
    )  # fmt: skip
    assert hits("test", run) >= 18
    # With the pages swapped among the rows, nothing is right any more: the answers come from the pages.
    assert hits("swapped", run) == 0

    # Merged, and unmerged by plain peft, give the same answers, row by row.
    predictions = tmp_path / f"test-{run.name}.jsonl"
    merge = run_cli(
        "merge_lora_weights", run, tmp_path / "merged", "--compare_on", files["test"], "--predictions", predictions,
        *IMAGES, "--limit", 8,
    )  # fmt: skip
    assert merge[0] == 0
    assert "Compared on 8 records" in merge[1]
    assert ": 0 answers differ between the adapter unmerged and merged" in merge[1]
    assert "| accuracy | " in (tmp_path / "merged/README.md").read_text()
    hits("test", tmp_path / "merged")
    assert (tmp_path / "test-merged.jsonl").read_bytes() == predictions.read_bytes()

    encoder = PromptEncoder.from_folder(run)
    records = read_records([files["test"]], images_dir=ROOT / "dataset")
    dataset = RecordDataset(records, Processor.from_folder(TINY, run), with_answers=False)
    unmerged = PeftModel.from_pretrained(load_base(TINY, torch.device("cpu")), run).eval()
    for i, predicted in enumerate(read_rows(predictions)[:8]):
        batch = PromptCollator(11)([dataset[i]])
        ids = unmerged.generate(**batch, max_new_tokens=30, do_sample=False, pad_token_id=11, eos_token_id=2)
        assert encoder.decode(ids[0, batch["input_ids"].shape[1] :].tolist()) == predicted["actual"]

    # The comparison sees a folder that is not base + adapter: here the base itself.
    monkeypatch.setattr(merge_comparison, "MAX_NEW_TOKENS", 30)
    comparison = merge_comparison.MergeComparer(records[:2], TINY, Adapter(run)).run(TINY, torch.device("cpu"))
    assert len(comparison.answers) == 2
    assert all(unmerged != merged for unmerged, merged in comparison.answers)
    assert comparison.logit_difference > 1


def test_the_sample_is_what_its_script_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_dataset.py", "--output", str(tmp_path), "--train", "3", "--test", "3"])
    make_dataset.main()
    for name in ("train", "test", "train-invoices", "test-invoices", "test-reading"):
        drawn = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert drawn == (ROOT / f"dataset/{name}.jsonl").read_text().splitlines()[:3]
    for picture in tmp_path.glob("*.png"):
        with Image.open(picture) as drawn, Image.open(ROOT / "dataset" / picture.name) as kept:
            assert list(drawn.convert("L").getdata()) == list(kept.convert("L").getdata())


def test_nothing_of_the_samples_test_pages_occurs_in_its_training():
    expected = {name: [r["expected"] for r in read_rows(ROOT / f"dataset/{name}.jsonl")] for name in SAMPLE}
    assert {name: len(answers) for name, answers in expected.items()} == SAMPLE
    assert not set(expected["train"]) & set(expected["test"])
    for field in ("number", "date", "total"):
        values = [{json.loads(a)[field] for a in expected[name]} for name in ("train-invoices", "test-invoices")]
        assert not values[0] & values[1]
        # Nor in what the base was pre-trained on.
        assert all(map(reserved, values[1]))
    assert all(map(reserved, expected["test"]))
