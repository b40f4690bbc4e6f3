"""What docs/data.md says of public sets: each command is run as it stands there, and its records are valid."""

import json
import re
import shlex

import datasets
import pytest

from mistral_ft.data.formats import convert
from mistral_ft.data.tables import open_table
from tests.conftest import ROOT, make_page, read_rows, write_jsonl

SECTION = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition("## Public sets")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"^python -m reformat_data (.*)$", SECTION, re.MULTILINE)
RECEIPT = {"company": "Salt Ltd", "total": "9.00"}
AS_TEXT = '{"company": "Salt Ltd", "total": "9.00"}'
GROUND_TRUTH = json.dumps({"gt_parse": RECEIPT, "meta": {"version": "2.0.0"}, "valid_line": [{"words": []}]})


def block(number, label, text, *linking):
    return {"id": number, "label": label, "text": text, "linking": list(linking), "words": [], "box": [0, 0, 1, 1]}


FORM = {
    "form": [
        block(0, "question", "TO:", [0, 1]),
        block(1, "answer", "Salt Office", [0, 1]),
        block(2, "question", "CC:", [2, 3], [2, 4]),
        block(3, "answer", "A. Ash", [2, 3]),
        block(4, "answer", "B. Birch", [2, 4]),
        block(5, "question", "FAX:"),
        block(6, "header", "MEMO"),
    ]
}


def region(number, **value):
    return {"id": number, "value": {"x": 1, "y": 1, "width": 5, "height": 5, **value}}


TASK = {
    "id": 12,
    "data": {"ocr": "/data/upload/1/a%20b.png"},
    "annotations": [
        {"was_cancelled": True, "result": []},
        {
            "result": [
                {"id": "k", "type": "choices", "from_name": "kind", "value": {"choices": ["Receipt"]}},
                {"id": "n", "type": "textarea", "from_name": "note", "value": {"text": ["Paid"]}},
                region("r", rectanglelabels=["Total"]) | {"type": "rectanglelabels", "from_name": "label"},
                region("r") | {"type": "rectangle", "from_name": "bbox"},
                region("r", text=["9.00"]) | {"type": "textarea", "from_name": "transcription"},
            ]
        },
    ],
}

# The first argument: (files of the set, its pages, the first record's image, question and answer).
SETS = {
    "lf/dataset_info.json:invoices": (
        {
            "lf/dataset_info.json": {"other": {"file_name": "x.json"}, "invoices": {"file_name": "rows/a.json"}},
            "lf/rows/a.json": [{"instruction": "Sum?", "input": "", "output": "9.00"}],
        },
        [],
        (None, "Sum?", "9.00"),
    ),
    "donut/metadata.jsonl": (
        {"donut/metadata.jsonl": [{"file_name": "a.png", "ground_truth": GROUND_TRUTH}]},
        ["donut/a.png"],
        ("a.png", "Read the receipt.", AS_TEXT),
    ),
    "cord/train.parquet": (
        {"cord/train.parquet": [{"image": {"bytes": None, "path": "a.png"}, "ground_truth": GROUND_TRUTH}]},
        ["cord/a.png"],
        ("train.parquet#row=0&column=image", "Read the receipt.", AS_TEXT),
    ),
    "folder/metadata.csv": (
        {"folder/metadata.csv": "file_name,text\na.png,Decree 5\n"},
        ["folder/a.png"],
        ("a.png", "Read the page.", "Decree 5"),
    ),
    "docvqa/val.json": (
        {"docvqa/val.json": {"dataset_name": "x", "data": [
            {"questionId": 5, "question": "Title?", "image": "documents/a.png", "answers": ["Decree 5", "No. 5"]}
        ]}},
        ["docvqa/documents/a.png"],
        ("documents/a.png", "Title?", ["Decree 5", "No. 5"]),
    ),
    "textvqa/val.json": (
        {"textvqa/val.json": {"data": [{"question": "Title?", "image_id": "a", "answers": ["Decree 5"] * 10}]}},
        ["textvqa/train_images/a.jpg"],
        ("train_images/a.jpg", "Title?", ["Decree 5"]),
    ),
    "sroie/key": (
        {"sroie/key/a.txt": RECEIPT},
        ["sroie/img/a.jpg"],
        ("img/a.jpg", "Company, date, address and total as JSON.", AS_TEXT),
    ),
    "funsd/annotations": (
        {"funsd/annotations/a.json": FORM},
        ["funsd/images/a.png"],
        (
            "images/a.png",
            "Read the form as JSON.",
            '{"TO:": "Salt Office", "CC:": ["A. Ash", "B. Birch"], "FAX:": null}',
        ),
    ),
    "labels/export.json": (
        {"labels/export.json": [TASK]},
        ["labels/upload/1/a b.png"],
        ("upload/1/a b.png", "Read the page as JSON.", '{"kind": "Receipt", "note": "Paid", "Total": "9.00"}'),
    ),
}  # fmt: skip


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(data).to_parquet(path)
    elif path.suffix == ".jsonl":
        write_jsonl(path, data)
    else:
        path.write_text(data if isinstance(data, str) else json.dumps(data, indent=1), encoding="utf-8")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    open_table.cache_clear()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documented_command_makes_valid_records(here, run_cli, command):
    source, out, *options = shlex.split(command)
    files, pages, (image, question, answer) = SETS[source]
    for name, data in files.items():
        write(here / name, data)
    for name in pages:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        make_page(here / name, 5)
    code, stdout, err = run_cli("reformat_data", source, out, *options)
    assert code == 0, err
    assert "1 rows read, 1 written, 0 dropped" in stdout
    (row,) = read_rows(out)
    text = {"type": "text", "text": question}
    asked = [{"type": "image", "image": image}, text] if image else question
    assert (row["messages"], row["expected"]) == ([{"role": "user", "content": asked}], answer)
    code, stdout, _ = run_cli("validate_data", out)
    assert (code, f"1 rows, {len(pages)} images" in stdout) == (0, True)


def test_every_set_has_its_command():
    assert {shlex.split(command)[0] for command in COMMANDS} == set(SETS)


ASK = {"prompt": "q", "answer": "a"}
JSON = {"prompt": "q", "json": "a"}

# Columns, a row, and what the record says: question and answer.
MAPS = {
    "within a field": ({"prompt": "x.q", "answer": "x.a"}, {"x": {"q": "Q", "a": "A"}}, "Q", "A"),
    "within JSON in a text": (ASK | {"answer": "x.y.a"}, {"q": "Q", "x": '{"y": "{\\"a\\": \\"A\\"}"}'}, "Q", "A"),
    "an item": (ASK | {"answer": "a.1.b"}, {"q": "Q", "a": [{}, {"b": "B"}]}, "Q", "B"),
    "a field with a point": (ASK | {"answer": "a.b"}, {"q": "Q", "a.b": "A", "a": {"b": "?"}}, "Q", "A"),
    "a text": (ASK | {"prompt": "{c} {m.q}: {\"x\"}"}, {"c": "C", "m": {"q": 3}, "a": "A"}, 'C 3: {"x"}', "A"),
    "an object": (JSON, {"q": "Q", "a": {"b": None, "c": ["ü"]}}, "Q", '{"b": null, "c": ["ü"]}'),
    "a list of objects": (JSON, {"q": "Q", "a": [{"b": 1}]}, "Q", '[{"b": 1}]'),
    "a list of texts as JSON": (JSON, {"q": "Q", "a": ["A", "B"]}, "Q", '["A", "B"]'),
    "answers": (ASK, {"q": "Q", "a": ["B", "A", "A", "C"]}, "Q", ["A", "B", "C"]),
    "parses": (
        JSON | {"json": "g.gt_parses"}, {"q": "Q", "g": '{"gt_parses": [{"b": 1}, {"b": 2}]}'}, "Q",
        ['{"b": 1}', '{"b": 2}'],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_columns_are_made_of_fields(name):
    columns, row, question, answer = MAPS[name]
    record, _ = convert(row, "columns", columns)
    assert (record["messages"], record["expected"]) == ([{"role": "user", "content": question}], answer)


def test_the_question_s_several_answers_are_known_by_name():
    record, _ = convert({"question": "Q", "answers": ["12", "twelve"], "questionId": 3}, "columns")
    assert record == {"messages": [{"role": "user", "content": "Q"}], "expected": ["12", "twelve"], "questionId": 3}


MAP_FAULTS = {
    "no such field": (ASK, {"q": "Q"}, "no `a`"),
    "no page": (ASK | {"image": "scan"}, {"q": "Q", "a": "A"}, "no `scan`"),
    "no field for a text": (ASK | {"image": "{id}.png"}, {"q": "Q", "a": "A"}, "no `id`"),
    "a number": (ASK, {"q": "Q", "a": 7}, "`a` must be a string, got 7"),
    "an object": (
        ASK, {"q": "Q", "a": {"b": "A"}},
        "`a` is an object; name a field of it: --map answer=a.b; or --map json=a for all of it as JSON",
    ),
    "no answers": (ASK, {"q": "Q", "a": []}, "`a` is an empty list; "),
    "numbers": (ASK, {"q": "Q", "a": [1]}, "answer 1 in `a` must be a string, got the number 1"),
    "a text as JSON": (JSON, {"q": "Q", "a": "A"}, "`a` must be an object or a list, got a string; a text is"),
    "no object": (JSON, {"q": "Q"}, "no `a`"),
}  # fmt: skip


@pytest.mark.parametrize("name", MAP_FAULTS)
def test_columns_that_are_not_there(name):
    columns, row, reason = MAP_FAULTS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        convert(row, "columns", columns)


# What is annotated otherwise, with the reason.
ANNOTATIONS = {
    "two people": (TASK | {"annotations": [TASK["annotations"][1]] * 2}, "number of annotations: 2; expected one"),
    "nobody": (TASK | {"annotations": []}, "number of annotations: 0; expected one"),
    "no page": (TASK | {"data": {"text": "x"}}, "no `data.image` or `data.ocr`: the page of the task"),
    "a polygon": (
        TASK | {"annotations": [{"result": [region("r") | {"type": "polygonlabels"}]}]},
        "a result of type 'polygonlabels'; only texts, choices and rectangles with texts are read",
    ),
    "a rectangle alone": (
        TASK | {"annotations": [{"result": [region("r", rectanglelabels=["Total"]) | {"type": "rectanglelabels"}]}]},
        "a rectangle without one label and a text, and boxes are not learned",
    ),
}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_annotations_that_are_not_understood(here, run_cli, name):
    task, reason = ANNOTATIONS[name]
    (here / "a.json").write_text(json.dumps([task]))
    code, _, err = run_cli("reformat_data", "a.json", "o.jsonl", "--format", "label_studio", "--question", "Q")
    assert (code, f"row 1: {reason}\n" in err) == (2, True)


def test_an_export_of_label_studio_is_known(here, run_cli):
    (here / "a.json").write_text(json.dumps([TASK], indent=1))
    hint = 'give Label Studio\'s export as: python -m reformat_data IN OUT --format label_studio --question "…"'
    assert f"a.json:1: a row of no known format, with the fields id, data, annotations; {hint}\n" in run_cli(
        "reformat_data", "a.json", "o.jsonl"
    )[2]  # fmt: skip
    assert hint in run_cli("validate_data", "a.json")[1]


def test_a_question_that_stands_twice_in_a_form(here, run_cli):
    write(here / "f/annotations/a.json", {"form": FORM["form"] + [block(9, "question", "TO:", [9, 1])]})
    code, _, err = run_cli("reformat_data", "f/annotations", "o.jsonl", "--format", "funsd", "--question", "Q")
    assert (code, "row 1: the question 'TO:' stands there twice\n" in err) == (2, True)


def test_a_file_of_the_folder_that_is_no_json(here, run_cli):
    write(here / "key/a.txt", "company: x")
    code, _, err = run_cli("reformat_data", "key", "o.jsonl", "--question", "Q", "--map", "json=json")
    assert (code, err) == (2, "error: key/a.txt: not JSON: Expecting value: line 1 column 1 (char 0)\n")
    (here / "empty").mkdir()
    code, _, err = run_cli("reformat_data", "empty", "o.jsonl")
    assert (code, err.startswith("error: empty: is a folder without a .json file for each page in it; ")) == (2, True)
