"""reformat_data: every format and every fault, literally; splits that leak nothing."""

import base64
import json
import re

import pytest

from mistral_ft.data.formats import DIRECT, convert
from mistral_ft.data.records import read_records
from mistral_ft.data.splitting import Splitter
from mistral_ft.errors import UserError
from tests.conftest import make_page, read_rows, write_jsonl


def says(role, content):
    return {"role": role, "content": content}


def text(words):
    return {"type": "text", "text": words}


def image(path):
    return {"type": "image", "image": path}


def learned(words):
    return {"role": "assistant", "content": words, "weight": 1}


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}


def turns(*pairs):
    return [{"from": speaker, "value": words} for speaker, words in pairs]


# name: (format that is found, row, record without its id)
GOOD = {
    "native": (
        "native",
        {"messages": [says("user", "Q")], "expected": "A", "page": 3},
        {"messages": [says("user", "Q")], "expected": "A", "page": 3},
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Translate.", "input": "chat", "output": "cat", "topic": "words"},
        {"messages": [says("user", "Translate.\n\nchat")], "expected": "cat", "topic": "words"},
    ),
    "alpaca without input": (
        "alpaca",
        {"instruction": "Say A.", "input": "", "output": "A"},
        {"messages": [says("user", "Say A.")], "expected": "A"},
    ),
    "alpaca with system and history": (
        "alpaca",
        {"instruction": "Q2", "output": "A2", "system": "S", "history": [["Q1", "A1"]]},
        {
            "messages": [says("system", "S"), says("user", "Q1"), learned("A1"), says("user", "Q2")],
            "expected": "A2",
        },
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": turns(("system", "S"), ("human", "Q1 image"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2"))},
        {
            "messages": [says("system", "S"), says("user", "Q1 image"), learned("A1"), says("user", "Q2")],
            "expected": "A2",
        },
    ),
    "llava": (
        "llava",
        {"image": "a.png", "conversations": turns(("human", "<image>\nWhat is it?"), ("gpt", "A cat."))},
        {"messages": [says("user", [image("a.png"), text("What is it?")])], "expected": "A cat."},
    ),
    "llava with several images and turns": (
        "llava",
        {
            "images": ["a.png", "b.png", "c.png"],
            "conversations": turns(
                ("human", "First <image> or <image>?"), ("gpt", "Say <image>"), ("human", "And\n<image>"), ("gpt", "B")
            ),
        },
        {
            "messages": [
                says("user", [text("First "), image("a.png"), text(" or "), image("b.png"), text("?")]),
                learned("Say <image>"),
                says("user", [text("And"), image("c.png")]),
            ],
            "expected": "B",
        },
    ),
    "llava without placeholder": (
        "llava",
        {"image": "a.png", "conversations": turns(("human", "What is it?"), ("gpt", "A cat."))},
        {"messages": [says("user", [image("a.png"), text("What is it?")])], "expected": "A cat."},
    ),
    "openai": (
        "openai",
        {"messages": [says("developer", "S"), says("user", "Q"), says("assistant", "A")], "tools": []},
        {"messages": [says("system", "S"), says("user", "Q")], "expected": "A", "tools": []},
    ),
    "openai parts": (
        "openai",
        {
            "messages": [
                says("user", [text("What?"), {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}]),
                says("assistant", [text("A "), text("cat.")]),
            ]
        },
        {"messages": [says("user", [text("What?"), image("a.png")])], "expected": "A cat."},
    ),
    "openai with thinking": (
        "openai",
        {"messages": [says("developer", "S"), says("user", "Q"), says("assistant", [THOUGHT, text("A")])]},
        {"messages": [says("system", "S"), says("user", "Q"), says("assistant", [THOUGHT, text("A")])]},
    ),
    "prompt and response": (
        "columns",
        {"prompt": "Q", "response": "A"},
        {"messages": [says("user", "Q")], "expected": "A"},
    ),
    "prompt and completion": (
        "columns",
        {"prompt": "Q", "completion": "A", "system": "S"},
        {"messages": [says("system", "S"), says("user", "Q")], "expected": "A"},
    ),
    "native with several right answers": (
        "native",
        {"messages": [says("user", "Q")], "expected": ["A", "B", "A"]},
        {"messages": [says("user", "Q")], "expected": ["A", "B", "A"]},
    ),
    "question and several right answers": (
        "columns",
        {"question": "Q", "answer": ["A", "B"]},
        {"messages": [says("user", "Q")], "expected": ["A", "B"]},
    ),
    "question and answer": (
        "columns",
        {"question": "Q", "answer": "A", "image": "a.png"},
        {"messages": [says("user", [image("a.png"), text("Q")])], "expected": "A"},
    ),
    "inst": (
        "inst",
        {"text": "<s>[INST] Q [/INST] A </s>", "page": 1},
        {"messages": [says("user", "Q")], "expected": "A", "page": 1},
    ),
    "inst of several turns": (
        "inst",
        {"text": "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Q1[/INST]A1</s>[INST]Q2[/INST]A2\nA3</s>"},
        {
            "messages": [says("system", "S"), says("user", "Q1"), learned("A1"), says("user", "Q2")],
            "expected": "A2\nA3",
        },
    ),
}


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("name", GOOD)
def test_every_format_becomes_records(tmp_path, run_cli, name, array):
    form, source, record = GOOD[name]
    path, out = tmp_path / "in.json", tmp_path / "out.jsonl"
    if array:
        path.write_text(json.dumps([source, source], indent=1))
    else:
        write_jsonl(path, [source, source])
    code, stdout, err = run_cli("reformat_data", path, out)
    assert code == 0, err
    assert stdout.splitlines() == [
        f"{path}: rows of format {form}, by its first rows",
        "2 rows read, 2 written, 0 dropped",
        f"2 records in {out}",
    ]
    assert read_rows(out) == [{"id": f"in-{number}"} | record for number in (1, 2)]
    assert [r.data for r in read_records([out], expected_required=True)] == read_rows(out)
    assert not list(tmp_path.glob(".*"))


def test_columns_of_other_names(tmp_path, run_cli):
    path = write_jsonl(tmp_path / "in.jsonl", [{"id": 7, "q": "Q", "a": "A", "scan": "x.png", "image": "thumb.png"}])
    columns = ["--map", "prompt=q", "--map", "answer=a", "--map", "image=scan"]
    assert run_cli("reformat_data", path, tmp_path / "out.jsonl", *columns)[0] == 0
    assert read_rows(tmp_path / "out.jsonl") == [
        {"id": 7, "messages": [says("user", [image("x.png"), text("Q")])], "expected": "A"}
    ]


def test_columns_of_several_right_answers(tmp_path, run_cli):
    docvqa = {"questionId": 7, "question": "Q", "image": "a.png", "answers": ["12 May", "12.05."], "answer": None}
    path = write_jsonl(tmp_path / "in.jsonl", [docvqa, docvqa | {"answers": []}, docvqa | {"answers": ["A", 3]}])
    columns = ["--map", "prompt=question", "--map", "answer=answers", "--map", "image=image"]
    code, stdout, _ = run_cli("reformat_data", path, tmp_path / "out.jsonl", *columns)
    assert code == 0
    assert stdout.splitlines()[1:4] == [
        "3 rows read, 1 written, 2 dropped",
        "  1 × `answers` is an empty list; name at least one right answer in it, or leave it out (row 2)",
        "  1 × answer 2 in `answers` must be a string, got the number 3; put JSON answers in quotes (row 3)",
    ]
    asked = [says("user", [image("a.png"), text("Q")])]
    assert read_rows(tmp_path / "out.jsonl") == [
        {"id": "in-1", "messages": asked, "expected": ["12 May", "12.05."], "questionId": 7}
    ]


def test_columns_within_columns(tmp_path, run_cli):
    squad = {"qa": {"question": "Q"}, "answers": {"text": ["A", "B"], "answer_start": [3, 9]}}
    path = write_jsonl(tmp_path / "in.jsonl", [squad, squad | {"answers": {"text": [], "answer_start": []}}])
    columns = ["--map", "prompt=qa.question", "--map", "answer=answers.text"]
    code, stdout, _ = run_cli("reformat_data", path, tmp_path / "out.jsonl", *columns)
    assert code == 0
    assert "  1 × `answers.text` is an empty list; name at least one right answer in it, or leave it out" in stdout
    assert read_rows(tmp_path / "out.jsonl") == [
        {"id": "in-1", "messages": [says("user", "Q")], "expected": ["A", "B"]} | squad  # columns are not cut up
    ]
    line = refused(run_cli, path, tmp_path / "no.jsonl", *columns[:3], "answer=answers")
    assert "row 1: `answers` is an object; name a field of it: --map answer=answers.text" in line
    dotted = write_jsonl(tmp_path / "dotted.jsonl", [{"q.a": "Q", "q": {"a": "no"}, "a": "A"}])
    columns = ["--map", "prompt=q.a", "--map", "answer=a"]
    assert run_cli("reformat_data", dotted, tmp_path / "own.jsonl", *columns)[0] == 0
    assert read_rows(tmp_path / "own.jsonl")[0]["messages"] == [says("user", "Q")]


def test_one_question_for_all_rows(tmp_path, run_cli):
    path = write_jsonl(tmp_path / "in.jsonl", [{"image": "a.png", "text": "Invoice 17"}])
    asked = ["--question", "Read the page.", "--map", "answer=text", "--map", "image=image"]
    assert run_cli("reformat_data", path, tmp_path / "out.jsonl", *asked)[0] == 0
    asked = [says("user", [image("a.png"), text("Read the page.")])]
    assert read_rows(tmp_path / "out.jsonl") == [{"id": "in-1", "messages": asked, "expected": "Invoice 17"}]


# name: (format, row, reason)
FAULTS = {
    "alpaca without output": ("alpaca", {"instruction": "Q"}, "no `output`"),
    "alpaca number": ("alpaca", {"instruction": "Q", "output": 7}, "`output` must be a string, got 7"),
    "alpaca history": (
        "alpaca",
        {"instruction": "Q", "output": "A", "history": [["Q"]]},
        "`history` must be a list of [question, answer] pairs",
    ),
    "history of a wrong type": (
        "alpaca",
        {"instruction": "Q", "output": "A", "history": 3},
        "`history` must be a list with something in it",
    ),
    "no turns": ("sharegpt", {"conversations": []}, "`conversations` must be a list with something in it"),
    "turn without value": (
        "sharegpt",
        {"conversations": [{"from": "human"}]},
        "turn 1: expected an object with `from` and a string `value`",
    ),
    "unknown speaker": (
        "sharegpt",
        {"conversations": turns(("bing", "Q"))},
        "turn 1: unknown `from` 'bing'; expected human, user, gpt, assistant, system",
    ),
    "speaker of a wrong type": (
        "sharegpt",
        {"conversations": turns(([], "Q"))},
        "turn 1: unknown `from` []; expected human, user, gpt, assistant, system",
    ),
    "question last": (
        "sharegpt",
        {"conversations": turns(("human", "Q"), ("gpt", "A"), ("human", "Q"))},
        "ends with the user's turn, so there is no answer to learn",
    ),
    "sharegpt with image": (
        "sharegpt",
        {"image": "a.png", "conversations": turns(("human", "Q"), ("gpt", "A"))},
        "has images: convert the file with --format llava",
    ),
    "too few placeholders": (
        "llava",
        {"images": ["a.png", "b.png"], "conversations": turns(("human", "<image>Q"), ("gpt", "A"))},
        "number of images: 2, of places for them: 1 (<image> in the user's texts, or image blocks without one); make "
        "them the same",
    ),
    "placeholder without image": (
        "llava",
        {"conversations": turns(("human", "<image>Q"), ("gpt", "A"))},
        "the text says <image>, but the row has no `image`",
    ),
    "image in bytes": (
        "llava",
        {"image": {"bytes": "…"}, "conversations": turns(("human", "<image>Q"), ("gpt", "A"))},
        "an image's bytes cannot stand in JSON: write its path, or a data: URL",
    ),
    "image without question": (
        "llava",
        {"image": "a.png", "conversations": turns(("gpt", "A"))},
        "has an image, but no question",
    ),
    "answer that is no text": (
        "openai",
        {"messages": [says("user", "Q"), says("assistant", [image("a.png")])]},
        "the last answer must be text",
    ),
    "message that is none": ("openai", {"messages": [3]}, "a message must be an object with `role` and `content`"),
    "no columns": (
        "columns",
        {"q": "Q"},
        "has none of prompt/response, prompt/completion, question/answer; name the columns: --map prompt=COLUMN "
        "--map answer=COLUMN",
    ),
    "open turn": ("inst", {"text": "<s>[INST] Q"}, "`text` is no chain of [INST] question [/INST] answer</s>"),
    "turn within a turn": (
        "inst",
        {"text": "[INST] Q [INST] Q [/INST] A"},
        "`text` is no chain of [INST] question [/INST] answer</s>",
    ),
    "no answer": ("inst", {"text": "[INST] Q [/INST]"}, "`text` has no answer after [/INST]"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_rows_that_cannot_be_converted(name):
    form, row, reason = FAULTS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        convert(row, form)


def test_what_is_dropped_is_said_by_reason_and_line(tmp_path, run_cli):
    path = tmp_path / "in.jsonl"
    rows = [{"prompt": "Q", "response": "A", "error": "x"}, *[{"prompt": "Q", "response": i} for i in range(7)]]
    write_jsonl(path, rows)
    with open(path, "a") as file:
        file.write('{"prompt": "Q", "resp\n')
    code, stdout, _ = run_cli("reformat_data", path, tmp_path / "out.jsonl")
    assert code == 0
    assert stdout.splitlines()[1:] == [
        "9 rows read, 1 written, 8 dropped",
        "  7 × `response` must be a string, got 0 (rows 2, 3, 4, 5, 6, …)",
        "  1 × the line ends in the middle of the record (column 21): is the file cut off? (row 9)",
        "Fields left out:",
        "  1 × `error`, a name that records use (row 1)",
        f"1 records in {tmp_path / 'out.jsonl'}",
    ]
    assert read_rows(tmp_path / "out.jsonl") == [{"id": "in-1", "messages": [says("user", "Q")], "expected": "A"}]


def refused(run_cli, *arguments) -> str:
    code, _, err = run_cli("reformat_data", *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if not line.startswith("converting: ")]
    return line.removeprefix("error: ")


PAIR = {"prompt": "Q", "response": "A"}
CHAT = {"conversations": turns(("human", "Q"), ("gpt", "A"))}


@pytest.mark.parametrize("before", [1, 150])
def test_mixed_files_are_refused_by_line(tmp_path, run_cli, before):
    path = write_jsonl(tmp_path / "in.jsonl", [PAIR] * before + [CHAT])
    line = refused(run_cli, path, tmp_path / "out.jsonl")
    assert line.startswith(f"{path}:{before + 1}: a row of format sharegpt among rows of format columns; ")
    assert sorted(tmp_path.iterdir()) == [path]
    assert run_cli("reformat_data", path, tmp_path / "out.jsonl", "--format", "columns")[0] == 0
    assert len(read_rows(tmp_path / "out.jsonl")) == before


def test_llava_files_may_hold_rows_without_image(tmp_path, run_cli):
    path = write_jsonl(tmp_path / "in.jsonl", [CHAT, CHAT | {"image": "a.png"}, CHAT])
    code, stdout, _ = run_cli("reformat_data", path, tmp_path / "out.jsonl")
    assert (code, stdout.splitlines()[1]) == (0, "3 rows read, 3 written, 0 dropped")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", ": holds no row"),
        ("[]", ": holds no row"),
        ("7", ": holds no row; {path}:1: expected a JSON object, got the number 7"),
        ("[1,", ": the line ends in the middle of the record (column 3): is the file cut off?"),
        ('{"a": 1, "b": 2}', ":1: a row of no known format, with the fields a, b; name its columns: --map prompt="),
        ('{"prompt": 1, "response": 2}', ": nothing to write, all rows were left out; row 1: `prompt` must be a"),
    ],
)
def test_files_of_which_nothing_comes(tmp_path, run_cli, content, reason):
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    assert refused(run_cli, path, tmp_path / "out.jsonl").startswith(f"{path}{reason.format(path=path)}")
    assert sorted(tmp_path.iterdir()) == [path]


def test_files_that_are_there_are_kept(tmp_path, run_cli):
    path = write_jsonl(tmp_path / "in.jsonl", [PAIR])
    other = write_jsonl(tmp_path / "out.jsonl", [{"mine": 1}])
    assert refused(run_cli, path, path, "--overwrite") == f"{path}: is the input itself; give another file"
    assert refused(run_cli, path, other) == f"{other}: is there already; give another file, or --overwrite"
    assert read_rows(other) == [{"mine": 1}]
    assert run_cli("reformat_data", path, other, "--overwrite")[0] == 0
    assert read_rows(other)[0]["expected"] == "A"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["--map", "prompt=q"],
            "--map needs --map answer=COLUMN and --map prompt=COLUMN, and takes --map image=COLUMN beside",
        ),
        (["--map", "prompt"], "--map takes NAME=VALUE"),
        (["--map", "prompt=q", "--map", "answer=a", "--format", "alpaca"], "--map has no effect with --format alpaca"),
        (["--split", "1"], "--split 1: must be a share between 0 and 1"),
        (["--seed", "3"], "--seed and --group have no effect without --split"),
        (["--limit", "0"], "--limit 0: must be at least 1"),
        (["--images_dir", "nowhere"], "nowhere: no such folder of images; give it with --images_dir"),
        (["--where", "page=9"], "in.jsonl: holds no row with page=9"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, run_cli, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", [PAIR])
    assert refused(run_cli, "in.jsonl", "out.jsonl", *arguments).startswith(reason)


def test_a_part_of_a_set(tmp_path, run_cli):
    rows = [PAIR | {"n": n, "meta": {"kind": "book" if n % 2 else "web"}} for n in range(10)]
    path, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    code, stdout, _ = run_cli("reformat_data", path, out, "--where", "meta.kind=book", "--limit", 3)
    assert code == 0
    assert stdout.splitlines()[1].endswith(" left out by --where, the rest by --limit")
    assert [row["n"] for row in read_rows(out)] == [1, 3, 5]
    assert run_cli("reformat_data", path, out, "--overwrite", "--where", "n=4")[0] == 0
    assert [row["n"] for row in read_rows(out)] == [4]


def data_url(path):
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_images_within_rows_become_files(tmp_path, run_cli):
    (tmp_path / "pages").mkdir()
    page = tmp_path / "pages/a b.png"
    make_page(page, 5)
    urls = [
        data_url(page),
        page.as_uri(),
        "https://example.com/a.png",
        "data:image/png;base64,AAAA",
        "file:///no/a.png",
    ]
    rows = [
        {"messages": [says("user", [{"type": "image_url", "image_url": {"url": url}}]), says("assistant", "A")]}
        for url in urls
    ]
    path, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "new.jsonl"
    code, stdout, _ = run_cli("reformat_data", path, out)
    assert code == 0
    assert stdout.splitlines()[1:] == [
        "5 rows read, 2 written, 3 dropped",
        "  1 × the image is on the web: download it (wget https://example.com/a.png) and put the file's path there "
        "(row 3)",
        "  1 × data:image/png;base64,AAAA holds no image that Pillow can open (row 4)",
        "  1 × image file:///no/a.png does not exist (row 5)",
        f"2 records in {out}",
        f"Images in {tmp_path / 'new-images'}",
    ]
    (file,) = (tmp_path / "new-images").iterdir()
    assert file.read_bytes() == page.read_bytes()
    for record in read_records([out]):
        assert record.image_paths == [str(file)]


def test_nothing_is_left_of_images_where_nothing_is_written(tmp_path, run_cli):
    make_page(tmp_path / "a.png", 5)
    good = {"prompt": "Q", "response": "A", "image": data_url(tmp_path / "a.png")}
    path = write_jsonl(tmp_path / "in.jsonl", [good, CHAT])
    before = sorted(tmp_path.iterdir())
    refused(run_cli, path, tmp_path / "out.jsonl")
    assert sorted(tmp_path.iterdir()) == before


def test_images_of_rows_that_are_dropped_go(tmp_path, run_cli):
    """The second row's image is the first one's and stays; the third has one of its own."""
    for number in (5, 6):
        make_page(tmp_path / f"{number}.png", number)
    five, six = (data_url(tmp_path / f"{number}.png") for number in (5, 6))
    rows = [PAIR | {"image": five}, {"prompt": "Q", "response": 7, "image": five}, PAIR | {"image": [six, "gone.png"]}]
    path, out = write_jsonl(tmp_path / "in.jsonl", [*rows, PAIR, PAIR | {"prompt": "Q2"}]), tmp_path / "new.jsonl"
    code, stdout, _ = run_cli("reformat_data", path, out, "--split", "0.5")
    assert code == 0
    assert "5 rows read, 3 written, 2 dropped" in stdout
    assert [file.read_bytes() for file in (tmp_path / "new-images").iterdir()] == [(tmp_path / "5.png").read_bytes()]


def test_image_paths_and_another_folder(tmp_path, run_cli):
    (tmp_path / "new").mkdir()
    make_page(tmp_path / "a.png", 5)
    rows = [PAIR | {"image": "a.png"}]
    path, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "new/out.jsonl"
    code, stdout, _ = run_cli("reformat_data", path, out)
    assert code == 0
    assert stdout.splitlines()[-1] == (
        f"Image paths are relative to {tmp_path}: give train and predict --images_dir {tmp_path}"
    )
    write_jsonl(path, [*rows, PAIR | {"image": data_url(tmp_path / "a.png")}])
    line = refused(run_cli, path, out, "--overwrite")
    assert line.startswith(f"{path}:2: images come as files and within the rows; write OUT into {tmp_path}, ")


def test_a_split_leaks_no_page_and_no_group(tmp_path, run_cli):
    rows = []
    for number in range(40):
        # Every page is there twice, under two names.
        make_page(tmp_path / f"{number}.png", number // 2 + 1)
        rows.append(PAIR | {"image": f"{number}.png", "page": number // 2, "customer": number // 4})
    path = write_jsonl(tmp_path / "in.jsonl", rows)

    def split(field, *arguments):
        code, stdout, _ = run_cli(
            "reformat_data", path, tmp_path / "o.jsonl", "--split", 0.8, "--overwrite", *arguments
        )
        assert code == 0
        train, test = (read_rows(tmp_path / f"o.{part}.jsonl") for part in ("train", "test"))
        assert stdout.splitlines()[-2:] == [
            f"{len(train)} records in {tmp_path / 'o.train.jsonl'}",
            f"{len(test)} records in {tmp_path / 'o.test.jsonl'}",
        ]
        assert (len(train), len(test)) == (32, 8)
        assert not {row[field] for row in train} & {row[field] for row in test}
        return [row["page"] for row in test]

    assert split("page") == split("page", "--seed", 0) != split("page", "--seed", 1)
    split("customer", "--group", "customer")
    assert not (tmp_path / "o.jsonl").exists()


def test_splits_that_cannot_be(tmp_path, run_cli):
    path = write_jsonl(tmp_path / "in.jsonl", [PAIR] * 4)
    out = tmp_path / "out.jsonl"
    line = refused(run_cli, path, out, "--split", 0.5)
    assert line == f"{path}: the 4 records cannot be split: they share pages or groups"
    assert "no `customer`, which --group goes by" in refused(run_cli, path, out, "--split", 0.5, "--group", "customer")
    write_jsonl(path, [PAIR | {"image": "gone.png"}])
    assert f"image {tmp_path / 'gone.png'} does not exist" in refused(run_cli, path, out, "--split", 0.5)
    assert sorted(tmp_path.iterdir()) == [path]


def test_records_stay_together_through_others():
    splitter = Splitter()
    for keys in (["a"], ["b"], ["c"], ["a", "b"], ["d"], ["d"]):
        splitter.add(keys)
    for seed in range(5):
        sides = splitter.divide(0.5, seed)
        assert sides[0] == sides[1] == sides[3]
        assert sides[4] == sides[5]
        assert sum(sides) == 3


@pytest.mark.parametrize("name", [name for name in GOOD if GOOD[name][0] in DIRECT])
def test_readers_of_records_take_some_formats_as_they_are(tmp_path, name):
    _, row, record = GOOD[name]
    path = write_jsonl(tmp_path / "in.jsonl", [row])
    assert [r.data for r in read_records([path], expected_required=True)] == [record]


@pytest.mark.parametrize("name", ["alpaca", "sharegpt", "llava", "openai", "openai parts"])
def test_readers_of_records_name_the_command(tmp_path, name):
    form, row, _ = GOOD[name]
    path = write_jsonl(tmp_path / "my rows.jsonl", [row])
    with pytest.raises(UserError) as error:
        read_records([path], expected_required=True)
    assert str(error.value).endswith(
        f"this looks like a row of format {form}, which becomes a record by: "
        f"python -m reformat_data '{path}' 'my rows-records.jsonl'"
    )


def test_a_converted_file_trains(tmp_path, run_cli, train_tiny):
    make_page(tmp_path / "a.png", 5)
    row = {"image": "a.png", "conversations": turns(("human", "<image>\nTitle?"), ("gpt", "Decree 5"))}
    path = write_jsonl(tmp_path / "in.jsonl", [row, row])
    assert run_cli("reformat_data", path, tmp_path / "out.jsonl")[0] == 0
    run = train_tiny(tmp_path / "out.jsonl", "--max_steps", 2)
    assert (run / "adapter_model.safetensors").is_file()
