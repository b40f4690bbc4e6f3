"""Thinking, the whole way: traces are learned, predicted apart from the answer, and do not count in scores."""

import json
import random

import pytest

pytest.importorskip("mistral_common")  # not to be had for Python 3.10
pytest.importorskip("sentencepiece")

from mistral_ft.data.prompt.encoder import PromptEncoder
from mistral_ft.data.records import Record, read_records
from mistral_ft.prediction.generator import Answer, Generator
from tests.conftest import TINY, read_rows, write_jsonl
from tests.helpers.conversations import CALL, HOW_TO_THINK, NASTY, TOOLS, assistant, text, thinking, user
from tests.helpers.tiny_models import sharpen, write_model, write_tekken

ROWS = [
    {
        "id": k,
        "messages": [
            HOW_TO_THINK,
            user(f"Title of document {k}?"),
            assistant([thinking([text(f"Hm, {k}.")], closed=True), text(f"Decree {k + 20}")]),
        ],
    }
    for k in range(4)
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v13")
    write_tekken(folder, "v13")
    return PromptEncoder.from_folder(folder)


def test_train_predict_merge_and_score(train_tiny, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, data = write_model(tmp_path / "base", "Ministral 3, text"), write_jsonl(tmp_path / "data.jsonl", ROWS)
    assert run_cli("validate_data", data, "--model_id", base)[1].endswith(
        "0 fatal problems in 0 of 4 rows, 0 warnings\n"
    )
    sharpen(base / "model.safetensors")
    # With five seeds, the least likely right answer has a probability of 0.995.
    run = train_tiny(
        data, "--model_id", base, "--max_steps", 100, "--per_device_train_batch_size", 4, "--learning_rate", "1e-2",
        "--eval_dataset", data, "--eval_steps", 100, "--save_strategy", "no",
    )  # fmt: skip
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (accuracy,) = [entry["eval_exact_match"] for entry in log if "eval_exact_match" in entry]
    assert accuracy == 1  # of what follows the thinking

    code, out, _ = run_cli("predict", data, run, "-o", "p.jsonl")
    assert (code, out) == (0, "4 rows in p.jsonl, 0 with an error\n")
    encoder = PromptEncoder.from_folder(run)
    for k, row in enumerate(read_rows(tmp_path / "p.jsonl")):
        assert row["messages"] == ROWS[k]["messages"][:2]
        assert (row["thinking"], row["actual"], row["expected"]) == (
            f"Hm, {k}.",
            f"Decree {k + 20}",
            f"Decree {k + 20}",
        )
        assert row["confidence"]["tokens"] == len(encoder._text(row["actual"])) + 1
    assert run_cli("score", "p.jsonl")[1].startswith("Accuracy = 4/4 = 1.0000")

    code, out, _ = run_cli("predict", data, run, "-o", "cut.jsonl", "--max_new_tokens", 3)
    assert (code, out.splitlines()[1]) == (
        0,
        "4 hold thinking without an answer, 4 of them cut off by --max_new_tokens",
    )
    cut = read_rows(tmp_path / "cut.jsonl")[0]
    assert (cut["thinking"], cut["actual"], cut["finish_reason"], "confidence" in cut) == ("Hm", "", "length", False)
    kinds = json.loads(run_cli("score", "cut.jsonl", "--json")[1])["wrong"]["kinds"]
    assert {kind: count for kind, count in kinds.items() if count} == {"length": 4}

    code, out, _ = run_cli("merge_lora_weights", run, "merged", "--compare_on", data)
    assert code == 0
    assert "0 answers differ between the adapter unmerged and merged" in out


def test_a_model_without_think_refuses_by_line(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "data.jsonl", [{"id": 9, "messages": [user("a")], "expected": "b"}, *ROWS])
    reason = "data.jsonl:2: thinking: the model's prompt, of version v7, has no [THINK]; leave it out, or take"
    assert run_cli("train", "--dataset", "data.jsonl", "--model_id", TINY)[2].startswith(f"error: {reason}")
    assert run_cli("predict", "data.jsonl", TINY)[2].startswith(f"error: {reason}")
    assert run_cli("validate_data", "data.jsonl", "--model_id", TINY)[1].startswith(f"{reason} a model that thinks\n")
    assert not list(tmp_path.glob("output/*"))


def test_validate_warns_of_thinking_as_text(run_cli, tmp_path):
    messages = [user("a"), assistant("[THINK]b[/THINK]c")]
    out = run_cli("validate_data", write_jsonl(tmp_path / "data.jsonl", [{"messages": messages}]))[1]
    expected = 'warning: [/THINK], [THINK] in a text is learned letter by letter; write blocks of type "thinking"'
    assert expected in out
    messages = [user("a"), assistant([thinking("[INST]"), text("c")])]
    out = run_cli("validate_data", write_jsonl(tmp_path / "data.jsonl", [{"messages": messages}]))[1]
    assert "warning: [INST] in a text is learned letter by letter; remove it if it is no text" in out


def test_what_is_expected_is_the_text(tmp_path):
    record = read_records([write_jsonl(tmp_path / "data.jsonl", ROWS[:1])])[0]
    assert record.expected == "Decree 20"
    assert record.learned == ["Hm, 0.Decree 20"]
    assert record.row["messages"] == ROWS[0]["messages"][:2]


@pytest.mark.parametrize("string", NASTY)
def test_thinking_and_answer_come_back_apart(encoder, string):
    row = {"messages": [user("a"), assistant([thinking(f"{string}?"), text(f"{string}!")])]}
    messages = Record(None, 1, row, None).conversation
    answer = [label for label in encoder.encode(messages)[1] if label >= 0]
    assert encoder.decode_thinking(answer) == f"{string}?"
    assert encoder.decode(answer) == f"{string}!"


def test_calls_come_back_without_the_thinking_before_them(encoder):
    messages = [user("a"), assistant([thinking("b"), text("c")], tool_calls=[CALL], weight=1)]
    answer = [label for label in encoder.encode(messages, tools=TOOLS)[1] if label >= 0]
    assert encoder.decode(answer) == 'c[{"name": "total", "arguments": {"invoice": "№ 7"}}]'
    assert encoder.decode_thinking(answer) == "b"


def test_confidence_is_that_of_the_answer(encoder):
    generator = Generator.__new__(Generator)
    generator.encoder = encoder
    control = encoder.control
    thought, said = [control.think, *encoder._text("So {1"), control.think_end], [*encoder._text('{"a": 1}'), 2]
    probs = [-random.Random(0).random() for _ in range(len(thought))] + [-0.25] * len(said)
    answer = generator._answer(thought + said, probs)
    assert answer == Answer('{"a": 1}', (-0.25,) * len(said), {"a": {"mean": -0.25, "min": -0.25}}, True, "So {1")
    assert answer.write_into({"id": 1, "thinking": "old", "error": "old"}) == {
        "id": 1, "thinking": "So {1", "actual": '{"a": 1}',
        "confidence": {"sum": -0.25 * len(said), "mean": -0.25, "min": -0.25, "tokens": len(said),
                       "fields": {"a": {"mean": -0.25, "min": -0.25}}},
        "finish_reason": "stop",
    }  # fmt: skip
    # Ended, but never closed: all of it is thinking.
    assert generator._answer([*thought[:-1], 2], probs[: len(thought)]) == Answer(thinking="So {1")
