"""Predict: every row once, in order, whatever the batches; stopped runs go on; bad rows are named."""

import json
import random
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel

from mistral_ft.data import packing
from mistral_ft.data.collators import PromptCollator, TrainingCollator
from mistral_ft.data.dataset import RecordDataset
from mistral_ft.data.packing import prompt_groups
from mistral_ft.data.predictions import Predictions
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import read_records
from mistral_ft.errors import UserError
from mistral_ft.model.adapter import Adapter
from mistral_ft.model.loading import load_base
from mistral_ft.prediction.batch_plan import plan_batches
from mistral_ft.prediction.decoding import GreedyDecoder
from mistral_ft.prediction.generator import PREDICTED
from tests.conftest import ROOT, TINY, read_rows, row, write_jsonl


def test_batches_are_of_like_length_longest_first():
    assert plan_batches([5, 9, 5, 7, 9], 2, 1000) == [[1, 4], [3, 0], [2]]
    assert plan_batches([], 2, 1000) == []


def test_batches_stay_within_the_token_limit_but_have_a_row():
    assert plan_batches([30, 10, 10, 10, 4], 8, 20) == [[0], [1, 2], [3, 4]]


@pytest.fixture
def run(pages, train_tiny):
    return train_tiny(pages / "train.jsonl", "--max_steps", 4, "--vision_lora", "True", "--save_steps", 4)


def test_every_record_comes_back_in_order_with_an_answer(pages, run, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = read_rows(pages / "train.jsonl")
    rows[2] |= {"customer": {"no": 7}, "actual": "old", "error": "old"}
    del rows[3]["expected"]
    write_jsonl(pages / "train.jsonl", rows)
    code, out, _ = run_cli("predict", pages / "train.jsonl", run, "--max_new_tokens", 5, "--batch_size", 3)
    assert code == 0
    assert out == f"8 rows in {run.name}.jsonl, 0 with an error\n"
    predicted = read_rows(tmp_path / f"{run.name}.jsonl")
    for before, after in zip(rows, predicted, strict=True):
        sure = after["confidence"]
        assert sure["min"] <= sure["mean"] < 0
        assert sure["sum"] == pytest.approx(sure["mean"] * sure["tokens"], abs=1e-3)
        assert isinstance(after["actual"], str)
        assert after["finish_reason"] == "length" or sure["tokens"] <= 5
        assert {k: v for k, v in after.items() if k not in PREDICTED} == {
            k: v for k, v in before.items() if k not in PREDICTED
        }
    assert not (tmp_path / f"{run.name}.jsonl.partial").exists()


@pytest.fixture
def predict(pages, run_cli, tmp_path):
    def predict(model, name, *arguments):
        output = tmp_path / name
        code, _, err = run_cli(
            "predict", pages / "train.jsonl", model, "-o", output, "--max_new_tokens", 10, *arguments
        )
        assert code == 0, err
        return output.read_bytes()

    return predict


def test_answers_do_not_depend_on_the_batch_size(run, predict):
    def answers(name, batch_size):
        rows = predict(run, name, "--batch_size", batch_size).decode().splitlines()
        return [json.loads(row)["actual"] for row in rows]

    expected = answers("1.jsonl", 1)
    assert answers("3.jsonl", 3) == answers("16.jsonl", 16) == expected


def test_adapter_checkpoint_and_merged_folder_answer_alike(run, predict, run_cli, tmp_path):
    expected = predict(run, "a.jsonl")
    assert run_cli("merge_lora_weights", run, tmp_path / "merged")[0] == 0
    assert predict(tmp_path / "merged", "b.jsonl") == expected
    assert predict(run / "checkpoint-4", "c.jsonl") == expected
    assert predict(TINY, "d.jsonl") != expected


def test_an_adapter_merged_in_memory_generates_what_the_unmerged_one_does(pages, run):
    dataset = RecordDataset(read_records([pages / "train.jsonl"]), Processor.from_folder(TINY, run), False)
    cpu = torch.device("cpu")
    unmerged = PeftModel.from_pretrained(load_base(TINY, cpu), run).eval()
    merged = load_base(TINY, cpu).eval()
    Adapter(run).merge_into(merged, torch.float32)
    for i in range(8):
        batch = PromptCollator(11)([dataset[i]])
        settings = dict(max_new_tokens=10, do_sample=False, pad_token_id=11, eos_token_id=2)
        assert merged.generate(**batch, **settings).tolist() == unmerged.generate(**batch, **settings).tolist()


def test_confidence_is_the_log_probability_of_the_answers_tokens(pages, run, predict):
    first = json.loads(predict(run, "a.jsonl", "--batch_size", 1).decode().splitlines()[0])
    record = read_records([pages / "train.jsonl"])[0]
    dataset = RecordDataset([record], Processor.from_folder(TINY, run), False)
    batch = PromptCollator(11)([dataset[0]])
    model = load_base(TINY, torch.device("cpu")).eval()
    Adapter(run).merge_into(model, torch.bfloat16)
    length = batch["input_ids"].shape[1]
    ids = model.generate(**batch, max_new_tokens=10, do_sample=False, pad_token_id=11, eos_token_id=2)
    batch["input_ids"], batch["attention_mask"] = ids, torch.ones_like(ids)
    log_probs = model(**batch).logits.log_softmax(-1)[0, length - 1 : -1]
    chosen = log_probs.gather(1, ids[0, length:, None])[:, 0]
    assert first["confidence"]["tokens"] == len(chosen)
    assert first["confidence"]["sum"] == pytest.approx(chosen.sum().item(), abs=1e-3)
    assert first["confidence"]["min"] == pytest.approx(chosen.min().item(), abs=1e-3)
    assert first["finish_reason"] == ("stop" if ids[0, -1] == 2 else "length")


def test_limit_answers_the_first_rows(run, predict):
    assert [json.loads(r)["id"] for r in predict(run, "a.jsonl", "--limit", 3).decode().splitlines()] == [0, 1, 2]


def test_a_row_with_a_bad_page_gets_an_error_and_the_others_go_on(pages, run, run_cli, tmp_path):
    (pages / "2.png").unlink()
    (pages / "4.png").write_bytes(b"no image")
    output = tmp_path / "out.jsonl"
    code, out, err = run_cli("predict", pages / "train.jsonl", run, "-o", output, "--max_new_tokens", 3)
    assert code == 1
    assert out == f"8 rows in {output}, 2 with an error\n"
    assert f"error: {pages / 'train.jsonl'}:3: image {pages / '2.png'} does not exist\n" in err
    rows = read_rows(output)
    assert [("error" in r, "actual" in r) for r in rows] == [
        (i in (2, 4), i not in (2, 4)) for i in range(8)
    ]  # fmt: skip
    assert (
        rows[4]["error"] == f"image {pages / '4.png'} cannot be opened: no PDF, and no image format that Pillow knows"
    )


def test_a_bad_record_stops_predict_before_the_model_is_loaded(pages, run, run_cli, tmp_path):
    with open(pages / "train.jsonl", "a") as file:
        file.write('{"messages": []}\n')
    code, out, err = run_cli("predict", pages / "train.jsonl", run, "-o", tmp_path / "out.jsonl")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {pages / 'train.jsonl'}:9: `messages` must be a list")
    assert not list(tmp_path.glob("out.jsonl*"))


def test_the_dataset_is_never_written_over(pages, run, run_cli):
    before = (pages / "train.jsonl").read_bytes()
    code, _, err = run_cli("predict", pages / "train.jsonl", run, "-o", pages / "train.jsonl")
    assert code == 2
    assert "is the dataset itself; give another file with -o" in err
    assert (pages / "train.jsonl").read_bytes() == before


def test_another_tokenizer_than_that_of_training_is_refused(pages, run, run_cli):
    (run / "tokenizer.json").write_text((run / "tokenizer.json").read_text() + " ")
    code, _, err = run_cli("predict", pages / "train.jsonl", run)
    assert code == 2
    assert "is not the one the adapter was trained with" in err


PLAN = [[2, 0], [1, 3], [4]]
SETTINGS = {"model": "m", "batch_size": 2}


def start(tmp_path, **changes) -> Predictions:
    return Predictions(tmp_path / "out.jsonl", SETTINGS | changes, PLAN)


def finished(tmp_path) -> bytes:
    predictions = start(tmp_path)
    for batch in predictions.batches_left:
        predictions.add({i: row(i, "A") | {"actual": f"answer {i}"} for i in batch})
    predictions.finish()
    return (tmp_path / "out.jsonl").read_bytes()


def test_a_run_cut_at_any_byte_ends_with_the_same_file(tmp_path):
    predictions = start(tmp_path)
    for batch in PLAN:
        predictions.add({i: row(i, "A") | {"actual": f"answer {i}"} for i in batch})
    whole = predictions.partial.read_bytes()
    first_line = whole.index(b"\n") + 1
    predictions.finish()
    expected = (tmp_path / "out.jsonl").read_bytes()
    assert [json.loads(line)["id"] for line in expected.splitlines()] == [0, 1, 2, 3, 4]
    for cut in range(first_line, len(whole) + 1, 7):
        predictions.partial.write_bytes(whole[:cut])
        assert finished(tmp_path) == expected
    assert not predictions.partial.exists()


def test_whole_batches_are_kept_and_others_done_again(tmp_path):
    predictions = start(tmp_path)
    predictions.add({2: row(2), 0: row(0)})
    with open(predictions.partial, "a") as file:  # half of the next batch
        file.write(json.dumps({"index": 1, "row": row(1)}) + "\n")
    again = start(tmp_path)
    assert sorted(again.done) == [0, 2]
    assert again.batches_left == [[1, 3], [4]]


def test_a_changed_setting_is_refused_unless_started_over(tmp_path):
    start(tmp_path).add({2: row(2), 0: row(0)})
    with pytest.raises(UserError, match=r"jsonl.partial is an unfinished run with another model; --overwrite starts"):
        start(tmp_path, model="other")
    assert Predictions(tmp_path / "out.jsonl", SETTINGS | {"model": "other"}, PLAN, overwrite=True).done == {}


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_file(pages, tmp_path):
    rng = random.Random(0)
    data = write_jsonl(pages / "many.jsonl", [row(n, "A", [f"{n % 8}.png"] if n % 5 else []) for n in range(300)])
    command = [sys.executable, "-m", "predict", data, TINY, "--max_new_tokens", "3", "--batch_size", "4"]

    def start(name):
        return subprocess.Popen([*command, "-o", tmp_path / name], cwd=ROOT, stderr=subprocess.DEVNULL)

    assert start("whole.jsonl").wait() == 0
    partial = tmp_path / "killed.jsonl.partial"
    kills = 0
    while kills < 8:
        process = start("killed.jsonl")
        enough = (partial.stat().st_size if partial.exists() else 0) + rng.randint(1, 6000)
        while not (partial.exists() and partial.stat().st_size >= enough):
            assert process.poll() is None, "it was done before it was killed often enough"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        assert not (tmp_path / "killed.jsonl").exists()
        kills += 1
    assert start("killed.jsonl").wait() == 0
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(read_rows(tmp_path / "killed.jsonl")) == 300
    assert sorted(path.name for path in tmp_path.glob("*killed*")) == ["killed.jsonl"]


@pytest.mark.parametrize(
    "search", [("--num_beams", 3), ("--temperature", 0.7, "--top_p", 0.9), ("--top_k", 5), ("--num_beams", 1)]
)
def test_answers_by_beams_and_samples_repeat(run, predict, search):
    first = predict(run, "a.jsonl", *search)
    assert predict(run, "b.jsonl", *search) == first
    rows = [json.loads(line) for line in first.decode().splitlines()]
    assert all(-60 < row["confidence"]["sum"] <= 0 for row in rows)
    assert all(0 < row["confidence"]["tokens"] <= 10 for row in rows)


def test_beams_find_likelier_answers_than_greedy_decoding(run, predict):
    greedy, beams = (
        [json.loads(line) for line in predict(run, f"{n}.jsonl", "--num_beams", n).decode().splitlines()]
        for n in (1, 4)
    )
    assert [row["actual"] for row in greedy] != [row["actual"] for row in beams]
    # Longer answers are less likely; compare those of one length.
    pairs = [(a["confidence"], b["confidence"]) for a, b in zip(greedy, beams, strict=True)]
    same = [(a["sum"], b["sum"]) for a, b in pairs if a["tokens"] == b["tokens"]]
    assert same
    assert all(b >= a - 1e-3 for a, b in same)


def test_samples_depend_on_the_seed(run, predict):
    sampled = {predict(run, f"{seed}.jsonl", "--temperature", 3, "--seed", seed) for seed in (0, 1, 2)}
    assert len(sampled) == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--batch_size", "many"), "--batch_size many: must be a number or auto"),
        (("--temperature", -1), "--temperature -1: out of range"),
        (("--top_p", 1.5), "--top_p 1.5: out of range"),
        (("--num_beams", 0), "--num_beams 0: must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(pages, run_cli, arguments, reason):
    code, _, err = run_cli("predict", pages / "train.jsonl", TINY, *arguments)
    assert code == 2
    assert reason in err


def test_a_run_goes_on_with_its_own_batches(tmp_path):
    start(tmp_path).add({2: row(2), 0: row(0)})
    again = Predictions(tmp_path / "out.jsonl", SETTINGS, [[0], [1], [2, 3, 4]])
    assert again.batches_left == [[1, 3], [4]]
    with pytest.raises(UserError, match="unfinished run with other batches"):
        Predictions(tmp_path / "out.jsonl", SETTINGS, [[0], [1], [2, 3]])


def test_the_greedy_decoder_takes_the_likeliest_token_each_time(pages):
    """Against the whole model run anew for every token, without any cache."""
    model = load_base(TINY, torch.device("cpu")).eval()
    dataset = RecordDataset(read_records([pages / "train.jsonl"]), Processor.from_folder(TINY), False)
    examples = [dataset[number] for number in range(8)]
    expected = []
    for example in examples:
        batch, ids = PromptCollator(11)([example]), []
        with torch.no_grad():
            while len(ids) < 6 and 2 not in ids:
                grown = batch | {"input_ids": torch.tensor([example.input_ids + ids])}
                del grown["attention_mask"]
                ids.append(model(**grown, use_cache=False).logits[0, -1].argmax().item())
        expected.append(ids)
    decoder = GreedyDecoder(load_base(TINY, torch.device("cpu")).eval(), eos=2)
    groups = [TrainingCollator(11)([examples[:3]]), TrainingCollator(11)([examples[3:]])]
    for _ in range(2):  # the second time with the cache of the first
        ids, log_probs = decoder.decode(groups, max_new_tokens=6)
        assert ids == expected
        assert [len(row) for row in log_probs] == [len(row) for row in ids]


def test_prompts_are_read_in_groups(monkeypatch):
    monkeypatch.setattr(packing, "MAX_PROMPT_TOKENS", 10)
    assert list(prompt_groups([4, 6, 1, 20, 3])) == [[0, 1], [2], [3], [4]]
