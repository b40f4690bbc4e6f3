"""The whole loop on the embedded base: what is trained is answered, scored and merged."""

import pytest
import torch
from peft import PeftModel

from mistral_ft import merge_comparison
from mistral_ft.data import PromptCollator, RecordDataset
from mistral_ft.images import ImageFitter
from mistral_ft.lora import Adapter
from mistral_ft.model import load_base
from mistral_ft.prompt import PromptEncoder
from mistral_ft.records import read_records
from tests.conftest import ROOT, TINY, make_page, read_rows, row, write_jsonl


@pytest.fixture
def data(tmp_path):
    """Eight small pages; only the page tells which of the answers is right."""
    rows = []
    for number in range(8):
        make_page(tmp_path / f"{number}.png", 17 * number + 1, (112, 84))
        rows.append(
            row(number, f"Decree {number * 11} on {['Salt', 'Bread', 'Lamp Oil'][number % 3]}", [f"{number}.png"])
        )
    return write_jsonl(tmp_path / "train.jsonl", rows)


def test_pages_are_memorised_and_merged_answers_are_the_adapters(data, train_tiny, run_cli, tmp_path, monkeypatch):
    run = train_tiny(
        data, "--learning_rate", "5e-3", "--num_train_epochs", 60, "--per_device_train_batch_size", 4,
        "--vision_lora", "True", "--train_projector", "True", "--lr_scheduler_type", "cosine", "--save_strategy", "no",
    )  # fmt: skip
    predictions, errors = tmp_path / "predictions.jsonl", tmp_path / "errors.jsonl"
    assert run_cli("predict", data, run, "-o", predictions, "--max_new_tokens", 20)[0] == 0
    code, out, _ = run_cli("score", predictions, "-e", errors)
    assert code == 0
    assert out.startswith("Accuracy = 8/8 = 1.0000 (")
    assert errors.read_text() == ""

    # The base itself knows nothing of this.
    assert run_cli("predict", data, TINY, "-o", tmp_path / "base.jsonl", "--max_new_tokens", 20)[0] == 0
    assert run_cli("score", tmp_path / "base.jsonl")[1].startswith("Accuracy = 0/8 = 0.0000")

    # With the pages swapped among the rows, nothing is right any more: the answers come from the pages.
    rows = read_rows(data)
    shifted = [
        r | {"messages": rows[(i + 1) % 8]["messages"]} for i, r in enumerate(rows)
    ]  # fmt: skip
    swapped = write_jsonl(tmp_path / "swapped.jsonl", shifted)
    assert run_cli("predict", swapped, run, "-o", tmp_path / "s.jsonl", "--max_new_tokens", 20)[0] == 0
    assert run_cli("score", tmp_path / "s.jsonl")[1].startswith("Accuracy = 0/8 = 0.0000")

    # Merged, and unmerged by plain peft, give the same answers, row by row.
    merge = run_cli("merge_lora_weights", run, tmp_path / "merged", "--compare_on", data, "--predictions", predictions)
    assert merge[0] == 0
    assert f"Compared on 8 records of {data}: 0 answers differ between the adapter unmerged and merged" in merge[1]
    assert "| accuracy | 8/8 = 1.0000 (95 % interval 0.676 to 1.000) |" in (tmp_path / "merged/README.md").read_text()
    merged = tmp_path / "merged.jsonl"
    assert run_cli("predict", data, tmp_path / "merged", "-o", merged, "--max_new_tokens", 20)[0] == 0
    assert merged.read_bytes() == predictions.read_bytes()

    encoder = PromptEncoder.from_folder(run)
    dataset = RecordDataset(read_records([data]), encoder, ImageFitter.from_folder(TINY), with_answers=False)
    unmerged = PeftModel.from_pretrained(load_base(TINY, torch.device("cpu")), run).eval()
    for i, predicted in enumerate(read_rows(predictions)):
        batch = PromptCollator(11)([dataset[i]])
        ids = unmerged.generate(**batch, max_new_tokens=20, do_sample=False, pad_token_id=11, eos_token_id=2)
        assert encoder.decode(ids[0, batch["input_ids"].shape[1] :].tolist()) == predicted["actual"]

    # The comparison sees a folder that is not base + adapter: here the base itself.
    monkeypatch.setattr(merge_comparison, "MAX_NEW_TOKENS", 20)
    comparer = merge_comparison.MergeComparer(read_records([data])[:2], TINY, Adapter(run))
    comparison = comparer.run(TINY, torch.device("cpu"))
    assert [pair[0] for pair in comparison.answers] == ["Decree 0 on Salt", "Decree 11 on Bread"]
    assert all(unmerged != merged for unmerged, merged in comparison.answers)
    assert comparison.logit_difference > 1


def test_the_sample_is_what_its_script_draws(tmp_path, monkeypatch):
    import sys

    from dataset import make_dataset

    monkeypatch.setattr(sys, "argv", ["make_dataset.py", "--output", str(tmp_path)])
    make_dataset.main()
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "dataset" / name).read_bytes()
    titles = [{r["expected"] for r in read_rows(tmp_path / f"{name}.jsonl")} for name in ("train", "test")]
    assert len(titles[0]) == 24
    assert len(titles[1]) == 8
    assert not titles[0] & titles[1]
