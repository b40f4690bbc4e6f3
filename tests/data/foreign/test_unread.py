"""What no model here would see is refused by its line, in every format; fields that are the user's stay."""

import pytest

from mistral_ft.data.records import read_records
from mistral_ft.errors import UserError
from tests.conftest import write_jsonl


def says(role, content):
    return {"role": role, "content": content}


CHAT = {"messages": [says("user", "Q"), says("assistant", "A")]}
PAIR = {"question": "Q", "answer": "A"}
SHOWS = "looks like a page, and nobody would see it: "

SECOND = (
    "looks like a page beside `image`: put all of them into a list, `images`; if it is none: "
    "python -m reformat_data IN OUT --map prompt=question --map answer=answer"
)

REFUSED = {
    "videos": (CHAT | {"videos": ["a.mp4"]}, "has videos (`videos`), which no model here sees"),
    "a sound": (PAIR | {"audio": {"path": "a.wav"}}, "has a sound (`audio`), which no model here sees"),
    "boxes": (CHAT | {"objects": {"bbox": [[1, 2, 3, 4]]}}, "has boxes of objects, which must stand in the"),
    "a place for a box": (
        {"messages": [says("user", "Where?"), says("assistant", "At <bbox>.")]},
        "message 2: the text says <bbox>: write what it stands for; if it is text, give --keep_image_tag",
    ),
    "a place for a name": ({"messages": [says("user", "<ref-object>?")], "expected": "A"}, "the text says"),
    "a place in `expected`": ({"messages": [says("user", "Q")], "expected": "<bbox>"}, "the text says <bbox>"),
    "a place in a result": (
        {"messages": [says("user", "Q"), says("assistant", "A"), says("tool", "<image>"), says("assistant", "A")]},
        "message 3: the text says <image>, and the row has no image for it",
    ),
    "preferences": (CHAT | {"rejected_response": "B"}, "has `rejected_response`: rows of preferences"),
    "an answer to avoid": ({"prompt": "Q", "completion": "A", "label": False}, "`label` is false, so its answer"),
    "a page in a chat": (CHAT | {"image_path": "a.png"}, f"`image_path` {SHOWS[:-2]}: call it `image`, or not"),
    "a page in Alpaca": (
        {"instruction": "Q", "output": "A", "img": "a.png"}, f"`img` {SHOWS[:-2]}: call it `image`, or not",
    ),
    "a page beside a question": (
        PAIR | {"scan": "a.TIF"},
        f"`scan` {SHOWS}python -m reformat_data IN OUT --map prompt=question --map answer=answer --map image=scan",
    ),
    "a page of a PDF": (PAIR | {"source": "a.pdf#page=3"}, f"`source` {SHOWS}"),
    "a page by its number": (PAIR | {"image_id": 77}, f"`image_id` {SHOWS}"),
    "pages by name": (PAIR | {"page_ids": ["x_p1"]}, f"`page_ids` {SHOWS}"),
    "a second page": (PAIR | {"image": "a.png", "image_2": "data:image/png;base64,iVBOR"}, f"`image_2` {SECOND}"),
    "a numbered page": (PAIR | {"image": "a.png", "image_1": "b.png"}, f"`image_1` {SECOND}"),
    "a system message apart": (CHAT | {"system": "S"}, "`system` beside `messages` would not be shown: make it"),
    "pages by name, and a text": (
        {"images": ["a"], "text": "T"}, "has `images`, but no question about it; if `text` is what the page says, this"
    ),
    "a page beside a text": (
        {"file_name": "a.png", "text": "Decree 5"},
        "has `file_name`, but no question about it; if `text` is what the page says, this makes records of it: "
        'python -m reformat_data IN OUT --question "Read the page." --map answer=text --map image=file_name',
    ),
    "a context": (
        {"question": "Q", "context": "C", "answers": ["A"]},
        "`context` would not be shown; put it into the question: python -m reformat_data IN OUT --map "
        "prompt='{context} {question}' --map answer=answers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_would_see_is_refused(tmp_path, name):
    row, reason = REFUSED[name]
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError) as stop:
        read_records([path])
    assert str(stop.value).startswith(f"{path}:1: ")
    assert reason in str(stop.value)


@pytest.mark.parametrize(
    "row",
    [
        CHAT | {"videos": [], "audio": None, "objects": 3, "rejected": False, "label": True, "source": "a.png"},
        {"messages": [says("user", "Q")], "expected": "A", "image_path": "a.png", "rejected": "B", "label": False},
        {
            "messages": [says("user", [{"type": "image", "image": "a.png"}]), says("assistant", "A")],
            "image_path": "a.png",
        },
        PAIR | {"image": "a.parquet#row=0&column=image", "embedding": "a.parquet#row=0&column=embedding"},
        PAIR | {"source": "a.pdf", "image": "a.png", "image_id": 7, "page": 3},
        {"text": "Decree 5", "file_name": "a.txt", "url": "https://example.com/a", "image_id": 3},
    ],
)
def test_fields_of_the_user_stay(tmp_path, row):
    (record,) = read_records([write_jsonl(tmp_path / "a.jsonl", [row])])
    for name in set(row) - {"messages", "image", "question", "answer", "text"}:
        assert record.data.get(name) == row[name]
