"""Plain text: cut into pieces without loss, read by predict, scored and compared by perplexity."""

import json
import math

import pytest
import torch
from transformers import Mistral3ForConditionalGeneration

from mistral_ft.data.dataset import cut_texts
from mistral_ft.data.prompt.encoder import IGNORE_INDEX, PromptEncoder, encode_record
from mistral_ft.data.records import read_records
from mistral_ft.scoring.perplexity import Texts, compare_texts, perplexity
from tests.conftest import TINY, read_rows, row, write_jsonl

TEXTS = [
    "The council of Dunmore met in the old hall.",
    "Salt is taxed by weight; see article 7.",
    "A long text. " * 30,
    "Ends",
]


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder.from_folder(TINY)


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", [{"id": k, "text": text} for k, text in enumerate(TEXTS)])


def test_long_text_is_cut_and_nothing_is_lost(data, encoder, capsys):
    records = read_records([data])
    whole = [encode_record(encoder, record, [], with_answer=True)[0] for record in records]
    assert [len(ids) for ids in whole] == [18, 18, 123, 5]
    pieces = cut_texts(records, encoder, 16)
    assert capsys.readouterr().out == "3 plain texts of more than 16 tokens are cut into 13 pieces\n"
    assert [record.line for record in pieces] == [1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4]
    encoded = [encode_record(encoder, record, [], with_answer=True) for record in pieces]
    assert max(len(ids) for ids, _ in encoded) == 16
    for line, ids in enumerate(whole, 1):
        labels = [
            label for record, pair in zip(pieces, encoded, strict=True) if record.line == line for label in pair[1]
        ]
        assert [label for label in labels if label != IGNORE_INDEX] == ids[1:]
    assert all(ids[0] == 1 and 1 not in ids[1:] for ids, _ in encoded)


def test_questions_are_never_cut(tmp_path, encoder):
    records = read_records([write_jsonl(tmp_path / "a.jsonl", [row(0, "a " * 100, text="b " * 100)])])
    assert cut_texts(records, encoder, 20) == records


def test_long_text_trains(data, train_tiny, capsys):
    run = train_tiny(data, "--max_seq_length", 32, "--max_steps", 2)
    assert json.loads((run / "run.json").read_text())["data"]["rows"] == 4


def test_validate_lets_long_text_pass(data, run_cli):
    code, out, _ = run_cli("validate_data", data, "--model_id", TINY, "--max_seq_length", 32)
    assert (code, "0 fatal problems" in out) == (0, True)


def reference_nll(encoder, text, most=10**6):
    model = Mistral3ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    total = 0.0
    for piece in encoder.pieces(text, most):
        ids = torch.tensor([[1, *piece]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * len(piece)
    return total


def test_predict_writes_what_transformers_finds(data, encoder, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli("predict", data, TINY, "-o", "out.jsonl")
    assert (code, out) == (0, "4 rows in out.jsonl, 0 with an error\n"), err
    rows = read_rows(tmp_path / "out.jsonl")
    assert [sorted(r) for r in rows] == [["id", "nll", "text", "tokens"]] * 4
    assert [r["tokens"] for r in rows] == [17, 17, 122, 4]
    for r in rows:
        assert r["nll"] == pytest.approx(reference_nll(encoder, r["text"]), rel=1e-4)
    code, _, err = run_cli("predict", data, TINY, "-o", "cut.jsonl", "--max_seq_length", 50, "--batch_size", 2)
    assert code == 0, err
    cut = read_rows(tmp_path / "cut.jsonl")
    assert [r["tokens"] for r in cut] == [17, 17, 122, 4]
    assert cut[2]["nll"] == pytest.approx(reference_nll(encoder, TEXTS[2], 50), rel=1e-4)
    assert abs(cut[2]["nll"] - rows[2]["nll"]) > 1  # less context


@pytest.mark.parametrize("more", [[], ["--num_beams", "2"]])
def test_texts_and_questions_in_one_file(more, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [row(0, "Paris"), {"id": 1, "text": TEXTS[0]}, row(2, "Rome"), {"id": 3, "text": TEXTS[1]}]
    data = write_jsonl(tmp_path / "mixed.jsonl", rows)
    code, _, err = run_cli("predict", data, TINY, "-o", "out.jsonl", "--max_new_tokens", 3, *more)
    assert code == 0, err
    found = read_rows(tmp_path / "out.jsonl")
    assert ["actual" in r for r in found] == [True, False, True, False]
    assert ["nll" in r for r in found] == [False, True, False, True]
    code, out, err = run_cli("score", "out.jsonl")
    assert (code, err) == (0, "")
    assert out.startswith("Accuracy = 0/2 = 0.0000")
    assert out.splitlines()[-1].startswith("Perplexity = ")
    assert out.splitlines()[-1].endswith("on 2 plain texts, 34 tokens")


def test_score_prints_perplexity_and_compares(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, nlls in (("before", (20.0, 30.0, 40.0)), ("after", (10.0, 15.0, 20.0))):
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [{"id": k, "text": "a", "nll": nll, "tokens": 10} for k, nll in enumerate(nlls)],
        )
    code, out, err = run_cli("score", "after.jsonl", "--compare", "before.jsonl")
    assert (code, err) == (0, "")
    assert out == (
        "Perplexity = 4.4817 (95 % interval 2.7183 to 7.3891) on 3 plain texts, 30 tokens\n"
        "Against before.jsonl, on 3 texts: 20.0855 there, 4.4817 here, 0.2231 times (95 % interval 0.1353 to 0.3679)\n"
        "Verdict: better at 95 %\n"
    )
    code, out, _ = run_cli("score", "after.jsonl", "--compare", "before.jsonl", "--json")
    found = json.loads(out)["text"]
    assert found["perplexity"] == pytest.approx(math.exp(1.5))
    assert found["comparison"]["verdict"] == "better"
    assert found["comparison"]["ratio"] == pytest.approx(math.exp(-1.5))


def test_what_cannot_be_compared_is_refused(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "nll": 3.0, "tokens": 3}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "a", "nll": 3.0, "tokens": 4}])
    write_jsonl(tmp_path / "c.jsonl", [{"text": "b", "nll": 3.0, "tokens": 4}])
    write_jsonl(tmp_path / "d.jsonl", [{"text": "b"}])
    code, _, err = run_cli("score", "a.jsonl", "--compare", "b.jsonl")
    assert (code, "b.jsonl:1 and a.jsonl:1 count other tokens of the same text" in err) == (2, True)
    code, _, err = run_cli("score", "a.jsonl", "--compare", "c.jsonl")
    assert (code, "share no plain text" in err) == (2, True)
    code, _, err = run_cli("score", "d.jsonl")
    assert (code, "no row has `expected`, or is plain text with `nll`" in err) == (2, True)
    code, _, err = run_cli("score", "a.jsonl", "--fail_under", "0.5", "--report", "r.html")
    assert (code, "--fail_under, --report: a.jsonl holds plain text only" in err) == (2, True)
    assert not (tmp_path / "r.html").exists()


def test_perplexity_weighs_tokens_and_its_interval_holds_it():
    texts = Texts()
    for line, (nll, tokens) in enumerate([(10.0, 10), (400.0, 100), (30.0, 20)], 1):
        texts.add(line, line, {"nll": nll, "tokens": tokens})
    found = perplexity(texts)
    assert found["perplexity"] == pytest.approx(math.exp(440 / 130))
    assert math.exp(1) <= found["perplexity_low"] < found["perplexity"] < found["perplexity_high"] <= math.exp(4)
    same = compare_texts(texts, texts, ("a", "b"))
    assert (same["ratio"], same["verdict"], same["left_out"]) == (1.0, "cannot tell", 0)


def test_domain_text_lowers_perplexity(run_cli, train_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(
        tmp_path / "law.jsonl", [{"id": k, "text": f"Article {k}. Salt is taxed by weight."} for k in range(6)]
    )
    run = train_tiny(data, "--max_steps", 15, "--per_device_train_batch_size", 6)
    for name, model in (("base", TINY), ("tuned", run)):
        code, _, err = run_cli("predict", data, model, "-o", f"{name}.jsonl")
        assert code == 0, err
    code, out, _ = run_cli("score", "tuned.jsonl", "--compare", "base.jsonl")
    assert code == 0
    assert "Verdict: better at 95 %" in out
    code, _, err = run_cli("merge_lora_weights", run, "merged", "--predictions", "tuned.jsonl")
    assert code == 0, err
    assert "| perplexity | " in (tmp_path / "merged/README.md").read_text()
