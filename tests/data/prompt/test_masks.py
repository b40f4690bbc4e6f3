"""What is learned of conversations and plain text, as exact lists; test_prompt_versions.py asks mistral-common."""

from pathlib import Path

import pytest

from mistral_ft.data.formats import as_record
from mistral_ft.data.prompt.encoder import IGNORE_INDEX, PromptEncoder, encode_record
from mistral_ft.data.records import Record, check_record, image_blocks
from tests.helpers.conversations import CHATS, NASTY, assistant, user

TINY = Path("models/tiny")
X = IGNORE_INDEX
GRID = (4, 3)


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder.from_folder(TINY)


def encoded(encoder, row) -> tuple[list[int], list[int]]:
    row = as_record(row)
    check_record(row, expected_required=True)
    record = Record(Path("a.jsonl"), 1, row, Path())
    return encode_record(encoder, record, [GRID] * len(image_blocks(record.conversation)), with_answer=True)


# What begins with [INST] is a question without an answer, and refused.
TEXTS = [s for s in NASTY if s.strip() and not s.startswith("[INST]")]


def test_every_answer_of_a_chat_is_learned(encoder):
    ids, labels = encoded(encoder, {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]})
    assert ids == [1, 3, 129, 4, 130, 2, 3, 131, 4, 132, 2]
    assert labels == [X, X, X, X, 130, 2, X, X, X, 132, 2]


def test_weight_0_is_not_learned(encoder):
    ids, labels = encoded(encoder, {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]})
    assert ids == [1, 3, 129, 4, 130, 2, 3, 131, 4, 132, 2]
    assert labels == [X, X, X, X, X, X, X, X, X, 132, 2]


def test_weight_1_before_expected_is_learned(encoder):
    messages = [user("a"), assistant("b", weight=1), user("c")]
    ids, labels = encoded(encoder, {"messages": messages, "expected": "d"})
    assert (ids, labels) == encoded(encoder, {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]})


def test_a_call_is_learned_with_its_control_token(encoder):
    call = {"id": "123456789", "function": {"name": "f", "arguments": "{}"}}
    ids, labels = encoded(encoder, {"messages": [user("a"), assistant("b", tool_calls=[call])]})
    written = encoder._text('[{"name": "f", "arguments": {}, "id": "123456789"}]')
    assert ids == [1, 3, 129, 4, 130, encoder.control.tool_calls, *written, 2]
    assert labels == [X, X, X, X, 130, encoder.control.tool_calls, *written, 2]
    assert encoder.decode(labels[4:]) == 'b[{"name": "f", "arguments": {}, "id": "123456789"}]'


@pytest.mark.parametrize("string", TEXTS)
def test_all_of_plain_text_is_learned(encoder, string):
    ids, labels = encoded(encoder, {"text": string})
    assert ids[0] == 1
    assert labels == [X, *ids[1:]]
    assert encoder.decode(ids) == string


def test_inst_text_becomes_turns(encoder):
    turns = encoded(encoder, {"text": "<s>[INST] a [/INST] b </s>[INST] c [/INST] d </s>"})
    assert turns == encoded(encoder, {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]})


def test_prompt_and_completion_in_messages(encoder):
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    assert encoded(encoder, row) == ([1, 3, 129, 4, 130, 2, 3, 131, 4, 132, 2], [X, X, X, X, X, X, X, X, X, 132, 2])


ROUND_TRIPS = [
    *[{"messages": messages, "tools": tools or []} for messages, tools in CHATS.values()],
    *[{"messages": [user("a")], "expected": s} for s in NASTY],
    *[{"text": s} for s in TEXTS],
]


@pytest.mark.parametrize("row", ROUND_TRIPS)
def test_what_is_learned_decodes_to_what_the_row_says(encoder, row):
    _, labels = encoded(encoder, row)
    record = Record(Path("a.jsonl"), 1, as_record(row), Path())
    parts = [[]]
    for label in labels:
        if label == encoder.control.eos:
            parts.append([])
        elif label != X:
            parts[-1].append(label)
    assert [encoder.decode(part) for part in parts[:-1]] == record.learned
    assert parts[-1] == []
    if row.get("expected") is not None:
        assert record.learned == [row["expected"].rstrip(" ")]
