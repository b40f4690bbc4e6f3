"""Rows of other toolkits: the images that a row has are the images that the model sees, or the row is refused."""

import json

import pytest

from mistral_ft.data.dataset import RecordDataset
from mistral_ft.data.formats import as_record
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import read_records
from mistral_ft.data.row_images import KEEP_TAG
from mistral_ft.errors import UserError
from tests.conftest import TINY, make_page, write_jsonl


@pytest.fixture
def folder(tmp_path):
    make_page(tmp_path / "a.png", 1)
    make_page(tmp_path / "b.png", 2, (56, 112))
    return tmp_path


def asks(content, **more):
    return {"role": "user", "content": content, **more}


def says(content):
    return {"role": "assistant", "content": content}


def text(words):
    return {"type": "text", "text": words}


A, B = {"type": "image", "image": "a.png"}, {"type": "image", "image": "b.png"}
CHAT = [asks("Q"), says("A")]

# Rows, each with the user's blocks that it must become.
SHOWN = {
    "LLaMA-Factory, messages": ({"messages": [asks("<image>Q"), says("A")], "images": ["a.png"]}, [A, text("Q")]),
    "LLaMA-Factory, two images": (
        {"messages": [asks("<image>\nfirst, <image> second"), says("A")], "images": ["a.png", "b.png"]},
        [A, text("first, "), B, text(" second")],
    ),
    "ms-swift, path": (
        {"messages": [asks("<image>Q"), says("A")], "images": [{"bytes": None, "path": "a.png"}]},
        [A, text("Q")],
    ),
    "no placeholder": ({"messages": CHAT, "images": ["a.png", "b.png"]}, [A, B, text("Q")]),
    "one image, no list": ({"messages": CHAT, "image": "a.png"}, [A, text("Q")]),
    "TRL, text blocks": ({"messages": [asks([text("Q")]), says([text("A")])], "images": ["a.png"]}, [A, text("Q")]),
    "TRL, image blocks": (
        {"messages": [asks([text("Q"), {"type": "image"}]), says("A")], "images": ["a.png"]},
        [text("Q"), A],
    ),
    "TRL, prompt and completion": (
        {"prompt": [asks([{"type": "image"}, text("Q")])], "completion": [says("A")], "images": ["a.png"]},
        [A, text("Q")],
    ),
    "prompt and completion as text": ({"prompt": "<image>Q", "completion": "A", "image": "a.png"}, [A, text("Q")]),
    "question and answer": ({"question": "Q", "answer": "A", "image": "a.png"}, [A, text("Q")]),
    "null keys of tables": (
        {"messages": [asks([A | {"text": None}, text("Q") | {"image": None}]), says("A")], "images": None},
        [A, text("Q")],
    ),
    "a placeholder in a text block": (
        {"messages": [asks([text("Q <image>")]), says("A")], "images": ["a.png"]},
        [text("Q "), A],
    ),
    "path and url": (
        {"messages": [asks([{"type": "image", "path": "a.png"}, {"type": "image", "url": "b.png"}]), says("A")]},
        [A, B],
    ),
    "images of the message": ({"messages": [asks("Q", images=["a.png"]), says("A")]}, [A, text("Q")]),
    "named and beside it": ({"messages": [asks([A, text("Q")]), says("A")], "images": ["a.png"]}, [A, text("Q")]),
    "named, and a place": (
        {"messages": [asks([A, text("<image>Q")]), says("A")], "images": ["a.png", "b.png"]},
        [A, B, text("Q")],
    ),
    "expected": ({"messages": [asks("<image>Q")], "expected": "A", "images": ["a.png"]}, [A, text("Q")]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_images_are_shown_where_the_row_has_them(folder, name):
    row, blocks = SHOWN[name]
    (record,) = read_records([write_jsonl(folder / "rows.jsonl", [row])], expected_required=True)
    (asked,) = [message for message in record.messages if message["role"] == "user"]
    assert asked["content"] == blocks
    example = RecordDataset([record], Processor.from_folder(TINY))[0]
    shown = [block["image"] for block in blocks if block["type"] == "image"]
    assert len(example.pixel_values) == len(shown) > 0
    assert example.image_sizes == [{"a.png": (56, 84), "b.png": (112, 56)}[image] for image in shown]


@pytest.mark.parametrize("name", SHOWN)
def test_what_predict_writes_is_read_as_it_was(name):
    once = as_record(SHOWN[name][0])
    assert as_record(json.loads(json.dumps(once))) == once


REFUSED = {
    "more images": (
        {"messages": [asks("<image>Q"), says("A")], "images": ["a.png", "b.png"]},
        "number of images: 2, of places for them: 1 (<image> in the user's texts, or image blocks without one); make",
    ),
    "fewer images": (
        {"messages": [asks("<image><image>Q"), says("A")], "images": ["a.png"]},
        "number of images: 1, of places for them: 2 (",
    ),
    "no image": ({"messages": [asks("<image>Q"), says("A")]}, "the text says <image>, and the row has no image for it"),
    "no image, in a block": ({"messages": [asks([text("<image>Q")]), says("A")]}, "the text says <image>"),
    "no image, an empty list": ({"messages": [asks("<image>Q"), says("A")], "images": []}, "the text says <image>"),
    "another image": (
        {"messages": [asks([A, text("Q")]), says("A")], "images": ["b.png"]},
        "no image block shows the row's image b.png; name it in one, or remove it",
    ),
    "two columns": (
        {"messages": CHAT, "image": "a.png", "images": ["b.png"]},
        "`image` and `images` have different images; leave one of them out",
    ),
    "bytes": (
        {"messages": CHAT, "images": [{"bytes": "iVBOR", "path": None}]},
        "an image's bytes cannot stand in JSON",
    ),
    "a number": ({"messages": CHAT, "image": 7}, "an image must be a path"),
    "image and text": (
        {"image": "a.png", "text": "Invoice 17"},
        'python -m reformat_data IN OUT --question "Read the page." --map answer=text --map image=image',
    ),
    "[INST] text": ({"image": "a.png", "text": "<s>[INST] Q [/INST] A</s>"}, "has `image`, but no question about it"),
    "text with an image": ({"messages": [asks([text("Q") | {"image": "a.png"}]), says("A")]}, "a text with an `image`"),
    "image with a text": ({"messages": [asks([A | {"text": "Q"}]), says("A")]}, "an image with a `text`"),
    "of the assistant": ({"messages": [asks("Q"), says("A") | {"images": ["a.png"]}]}, "its `images` is not read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_left_out_is_refused_by_line(folder, name):
    row, reason = REFUSED[name]
    with pytest.raises(UserError) as stop:
        read_records([write_jsonl(folder / "rows.jsonl", [row])])
    assert str(stop.value).startswith(f"{folder / 'rows.jsonl'}:1: ")
    assert reason in str(stop.value)


@pytest.mark.parametrize("step", ["train", "predict", "validate_data", "reformat_data"])
def test_the_tag_is_text_for_who_says_so(folder, run_cli, monkeypatch, step):
    monkeypatch.setenv(KEEP_TAG, "")  # so that what the step sets is undone
    monkeypatch.delenv(KEEP_TAG)
    data = write_jsonl(folder / "rows.jsonl", [{"messages": [asks("What does <image> mean?"), says("A picture.")]}])
    arguments = {
        "train": ["--model_id", TINY, "--dataset", data, "--output_dir", folder / "output", "--max_steps", 1],
        "predict": [data, TINY, "-o", folder / "p.jsonl", "--max_new_tokens", 1],
        "validate_data": [data],
        "reformat_data": [data, folder / "out.jsonl"],
    }[step]
    code, out, err = run_cli(step, *arguments)
    assert code in (1, 2)
    assert "the text says <image>, and the row has no image for it; if it is text, give --keep_image_tag" in out + err
    flag = ["--keep_image_tag", "True"] if step == "train" else ["--keep_image_tag"]
    assert run_cli(step, *arguments, *flag)[0] == 0


def test_nulls_of_ours_are_absent_and_others_stay(folder):
    call = {"id": None, "type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    row = {
        "id": None, "mine": None, "text": None, "tools": None, "expected": None,
        "messages": [asks("Q", weight=None), {"role": "assistant", "content": None, "tool_calls": [call]}],
    }  # fmt: skip
    (record,) = read_records([write_jsonl(folder / "rows.jsonl", [row])], expected_required=True)
    assert record.data["mine"] is None
    assert not {"id", "text", "tools", "expected"} & record.data.keys()
    assert record.expected == '[{"name": "f", "arguments": {"a": null}}]'


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_json_is_read_as_null(folder, constant):
    path = folder / "rows.jsonl"
    path.write_text(f'{{"messages": [{{"role": "user", "content": "Q"}}], "amount": {constant}}}\n')
    (record,) = read_records([path])
    assert record.data["amount"] is None
