"""Every fault of a data file ends in one line with file, line and the way to mend it."""

import json

import pytest

from mistral_ft.data.records import read_records
from mistral_ft.errors import UserError
from tests.conftest import row, write_jsonl

GOOD = json.dumps(row(0, "A"))
TRAILING = '{"messages": [{"role": "user", "content": "a"},], "expected": "b"}'

FAULTS = {
    "cut off": (GOOD[:60], "the line ends in the middle of the record (column 60): is the file cut off?"),
    "cut off in a string": (GOOD[:20], "the line ends in the middle of the record (column 20): is the file cut off?"),
    "trailing comma": (TRAILING, "trailing comma at column 47: JSON allows none, remove it"),
    "single quotes": ("{'messages': []}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    "list": ("[", "not one JSON object per line: write each record on a line of its own, with no list around them"),
    "pretty-printed": ("{", "not one JSON object per line: write each record on a line of its own, with no list"),
    "list in a line": ("[7,", "the line ends in the middle of the record (column 3): is the file cut off?"),
    "number": ("7", "expected a JSON object, got the number 7"),
    "no messages": ('{"expected": "a"}', "no `messages`; expected a list of messages with `role` and `content`"),
    "empty messages": ('{"messages": []}', "`messages` must be a list of at least one message, got an empty list"),
    "string messages": ('{"messages": "Hi"}', "`messages` must be a list of at least one message, got a string"),
    "unknown role": (
        '{"messages": [{"role": "human", "content": "a"}]}',
        "message 1: unknown role 'human'; expected one of system, user, assistant, tool",
    ),
    "no content": (
        '{"messages": [{"role": "user"}]}',
        "message 1: `content` must be a string or a list of blocks, got nothing",
    ),
    "number as content": (
        '{"messages": [{"role": "user", "content": 5}]}',
        "message 1: `content` must be a string or a list of blocks, got the number 5",
    ),
    "unknown block": (
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        "message 1: block 1: unknown type 'image_url'; expected 'text', 'image' or 'thinking'",
    ),
    "image without path": (
        '{"messages": [{"role": "user", "content": [{"type": "image", "image": 3}]}]}',
        "message 1: block 1: `image` must be the path of an image file, got the number 3",
    ),
    "image in a system message": (
        '{"messages": [{"role": "system", "content": [{"type": "image", "image": "a.png"}]}]}',
        "message 1: block 1: an image belongs in a user message, not in one of role 'system'",
    ),
    "thinking of the user": (
        '{"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}]}',
        "message 1: block 1: thinking belongs in an assistant or system message, not in one of role 'user'",
    ),
    "thinking that is nothing": (
        '{"messages": [{"role": "system", "content": [{"type": "thinking"}]}]}',
        "message 1: block 1: `thinking` must be a string or a list of text blocks, got nothing",
    ),
    "thinking in other blocks": (
        '{"messages": [{"role": "system", "content": [{"type": "thinking", "thinking": [{"type": "reference"}]}]}]}',
        "message 1: block 1: the list in `thinking` must hold text blocks and nothing else",
    ),
    "thinking half closed": (
        '{"messages": [{"role": "system", "content": [{"type": "thinking", "thinking": "a", "closed": 0}]}]}',
        "message 1: block 1: `closed` must be true or false, got the number 0",
    ),
    "text behind open thinking": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": '
        '[{"type": "thinking", "thinking": "b", "closed": false}, {"type": "text", "text": "c"}]}]}',
        "message 2: thinking that is not `closed` must be the last thing in its message",
    ),
    "a call behind open thinking": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": '
        '[{"type": "thinking", "thinking": "b", "closed": false}], "tool_calls": [{"function": {"name": "f", '
        '"arguments": {}}}]}]}',
        "message 2: thinking that is not `closed` must be the last thing in its message",
    ),
    "an answer behind open thinking": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": '
        '[{"type": "thinking", "thinking": "b", "closed": false}]}, {"role": "assistant", "content": "c"}]}',
        "message 3: follows thinking that is not `closed`, which must be the last thing that the assistant writes",
    ),
    "answer of weight 0": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}',
        "every message of the assistant has `weight` 0, so there is nothing to learn",
    ),
    "answer twice": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "expected": "b"}',
        "the answer is there twice, as the last message and in `expected`; leave out one of them",
    ),
    "weight of a half": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}',
        "message 2: `weight` belongs in an assistant message, and is 1 to learn it or 0 to leave it out",
    ),
    "number as text": ('{"text": 7}', "`text` must be a string, got the number 7"),
    "empty text": ('{"text": " \\n"}', "`text` is empty"),
    "text and expected": (
        '{"text": "a", "expected": "b"}',
        "`text` is learned whole and has no `expected`; a question and its answer need `messages`",
    ),
    "[INST] text without an answer": (
        '{"text": "<s>[INST] a [/INST]"}',
        "`text` has no answer after [/INST]",
    ),
    "prompt that is no text": ('{"prompt": 1, "completion": "b"}', "`prompt` must be a string, got 1"),
    "too few images": (
        '{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], "images": ["a.png"], '
        '"expected": "b"}',
        "number of images: 1, of places for them: 2 (",
    ),
    "a comment": ("// pages of 2024", "a comment at column 1: JSON allows none, remove it"),
    "silent assistant": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}, '
        '{"role": "user", "content": "b"}]}',
        "message 2: an assistant message says nothing: it needs `content` or `tool_calls`",
    ),
    "system after assistant": (
        '{"messages": [{"role": "assistant", "content": "a"}, {"role": "system", "content": "b"}]}',
        "message 2: a system message cannot follow a message of role 'assistant'",
    ),
    "number as expected": (
        '{"messages": [{"role": "user", "content": "a"}], "expected": 12}',
        "`expected` must be a string, got the number 12; put JSON answers in quotes",
    ),
    "no right answer": (
        '{"messages": [{"role": "user", "content": "a"}], "expected": []}',
        "`expected` is an empty list; name at least one right answer in it, or leave it out",
    ),
    "null among right answers": (
        '{"messages": [{"role": "user", "content": "a"}], "expected": ["b", null]}',
        "answer 2 in `expected` must be a string, got nothing; put JSON answers in quotes",
    ),
    "an object among right answers": (
        '{"messages": [{"role": "user", "content": "a"}], "expected": [{"b": 1}]}',
        "answer 1 in `expected` must be a string, got an object; put JSON answers in quotes",
    ),
    "answers beside the last message": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "expected": ["b"]}',
        "the answer is there twice, as the last message and in `expected`; leave out one of them",
    ),
    "no expected": (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "no `expected`: the answer to learn and to score against",
    ),
    "half a surrogate pair in the user's own field": (
        '{"messages": [{"role": "user", "content": "a"}], "expected": "a", "note": "\\uD83D"}',
        "holds half a surrogate pair (\\ud800 to \\udfff), which is no valid text",
    ),
    "nested too deeply": ('{"x": ' + "[" * 100_000, "nested too deeply to be read"),
    "data URL that is not base64": (
        '{"messages": [{"role": "user", "content": [{"type": "image", "image": "data:image/png,AAAA"}]}]}',
        "message 1: block 1: `image` is no base64 data URL (data:image/png;base64,…): data:image/png,AAAA",
    ),
    "pages from last to first": (
        '{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.pdf#page=4-1"}]}]}',
        "message 1: block 1: `image` must name pages as a.pdf#page=3 or a.pdf#page=1-4 do, not 'a.pdf#page=4-1'",
    ),
    "tools in another shape": (
        '{"messages": [{"role": "user", "content": "a"}], "expected": "b", "tools": [{"name": "f", "parameters": {}}]}',
        '`tools` must look like [{"type": "function", "function": {"name": …, "parameters": …}}]',
    ),
    "tools of the wrong type": (
        '{"messages": [{"role": "user", "content": "a"}], "expected": "b", "tools": "x"}',
        "`tools` is text that is no JSON",
    ),
    "tool calls of the wrong type": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": "call me"}]}',
        "message 2: `tool_calls` must look like [",
    ),
    "tool call without a function": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}',
        "message 2: `tool_calls` must look like [",
    ),
    "arguments that are no JSON": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": '
        '[{"function": {"name": "f", "arguments": "{a"}}]}]}',
        "message 2: `arguments` of f are no JSON",
    ),
    "arguments that are no object": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": '
        '[{"function": {"name": "f", "arguments": "[1]"}}]}]}',
        "message 2: `arguments` of f must be a JSON object, got a list",
    ),
    "tool call of the user": (
        '{"messages": [{"role": "user", "content": "a", "tool_calls": []}]}',
        "message 1: `tool_calls` belong in an assistant message, not in one of role 'user'",
    ),
    "tool_call_id of the wrong type": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
        '{"role": "tool", "content": "c", "tool_call_id": 5}]}',
        "message 3: `tool_call_id` must be a string, got the number 5",
    ),
    "half a surrogate pair": (
        '{"messages": [{"role": "user", "content": "\\ud83d"}], "expected": "a"}',
        "holds half a surrogate pair (\\ud800 to \\udfff), which is no valid text",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_with_file_and_line(tmp_path, fault):
    text, reason = FAULTS[fault]
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{text}\n")
    with pytest.raises(UserError) as error:
        read_records([path], expected_required=True)
    assert str(error.value).startswith(f"{path}:3: {reason}")
    assert "\n" not in str(error.value)


def test_not_utf8_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + "é".encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"data.jsonl:2: not UTF-8 text: .* at byte 1"):
        read_records([path])


def test_all_bad_rows_are_named_in_one_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([GOOD, "{", GOOD, "7", "null"]))
    with pytest.raises(UserError) as error:
        read_records([path])
    assert str(error.value).endswith("(and 2 more bad rows, on lines 4, 5)")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "is a folder; expected a JSONL file in it"),
        (lambda p: p.write_text(""), "holds no record"),
        (lambda p: p.write_text("\n \n"), "holds no record"),
    ],
)
def test_file_that_is_none_is_named(tmp_path, make, reason):
    path = tmp_path / "data.jsonl"
    make(path)
    with pytest.raises(UserError, match=reason):
        read_records([path])


def test_a_missing_images_dir_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD)
    with pytest.raises(UserError, match="nowhere: no such folder of images; give it with --images_dir"):
        read_records([path], tmp_path / "nowhere")


def test_records_keep_what_the_user_wrote(tmp_path):
    data = row(7, "B", ["x/a.png", "b.png"]) | {"customer": {"id": 3}, "weight": None}
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(data).encode())
    (record,) = read_records([path])
    assert record.data == data
    assert record.image_paths == [f"{tmp_path}/x/a.png", f"{tmp_path}/b.png"]
    assert read_records([path], tmp_path / "..")[0].image_paths[1] == f"{tmp_path}/../b.png"


def test_bad_rows_of_several_files_are_named_with_theirs(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f"{GOOD}\n7\n")
    with pytest.raises(UserError) as error:
        read_records([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}:2: expected a JSON object")
    assert str(error.value).endswith(f"(and 1 more bad rows, on lines {tmp_path / 'b.jsonl'}:2)")


def test_several_files_are_read_in_order(tmp_path):
    for name, number in (("b", 1), ("a", 2)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row(number)))
    records = read_records([tmp_path / "b.jsonl", tmp_path / "a.jsonl"])
    assert [record.data["id"] for record in records] == [1, 2]


def test_the_first_of_several_right_answers_is_learned(tmp_path):
    asked = {"role": "user", "content": "a"}
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": [asked], "expected": ["b", "c", "b"]}])
    (record,) = read_records([path], expected_required=True)
    assert record.answers == ["b", "c"]
    assert record.expected == "b"
    assert record.conversation == [asked, {"role": "assistant", "content": "b", "weight": 1}]
    assert (record.messages, record.learned) == ([asked], ["b"])
    assert record.row == {"messages": [asked], "expected": ["b", "c", "b"]}  # what predict writes
