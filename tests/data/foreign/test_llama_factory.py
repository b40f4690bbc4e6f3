"""LLaMA-Factory's dataset_info.json: which set, which columns, which tags; and what is refused by its name."""

import json
import re

import pytest

from mistral_ft.data.foreign.llama_factory import find_set
from mistral_ft.errors import UserError
from tests.conftest import make_page, read_rows

CALL = {"type": "function", "function": {"name": "total", "arguments": {"page": 1}}}
TOOL = {"name": "total", "description": "Sum", "parameters": {"type": "object", "properties": {}}}
COLUMNS = {"messages": "messages", "images": "images"}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def says(role, content, **more):
    return {"role": role, "content": content, **more}


def image(name):
    return {"type": "image", "image": name}


def text(words):
    return {"type": "text", "text": words}


# name: (the set's entry, its row, the record without id)
SETS = {
    "alpaca": (
        {},
        {"instruction": "Sum up.", "input": "Salt is taxed.", "output": "Tax", "topic": 3},
        {"messages": [says("user", "Sum up.\n\nSalt is taxed.")], "expected": "Tax", "topic": 3},
    ),
    "alpaca, columns": (
        {"columns": {"prompt": "q", "response": "a", "system": "s", "history": "h", "images": "scans"}},
        {"q": "And <image>?", "a": "B", "s": "Be brief.", "h": [["<image>Title?", "A"]], "scans": ["a.png", "b.png"]},
        {
            "messages": [
                says("system", "Be brief."),
                says("user", [image("a.png"), text("Title?")]),
                says("assistant", "A", weight=1),
                says("user", [text("And "), image("b.png"), text("?")]),
            ],
            "expected": "B",
        },
    ),
    "usual names beside others": (
        {"columns": {"images": "images"}},
        {"instruction": "<image>Title?", "output": "A", "images": ["a.png"]},
        {"messages": [says("user", [image("a.png"), text("Title?")])], "expected": "A"},
    ),
    "sharegpt": (
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system"}},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
        {"messages": [says("system", "S"), says("user", "Q")], "expected": "A"},
    ),
    "a system message in the turns": (
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system"}},
        {
            "conversations": [
                {"from": "system", "value": "T"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
            ],
            "system": "S",
        },
        {"messages": [says("system", "T"), says("user", "Q")], "expected": "A"},
    ),
    "tools": (
        {"formatting": "sharegpt", "columns": {"messages": "turns", "tools": "tools", "images": "images"}},
        {
            "turns": [
                {"from": "human", "value": "<image>Total?"},
                {"from": "function_call", "value": '{"name": "total", "arguments": {"page": 1}}'},
                {"from": "observation", "value": "9.00"},
                {"from": "gpt", "value": "Nine."},
            ],
            "tools": json.dumps([TOOL]),
            "images": ["a.png"],
        },
        {
            "messages": [
                says("user", [image("a.png"), text("Total?")]),
                says("assistant", "", tool_calls=[CALL], weight=1),
                says("tool", "9.00"),
            ],
            "expected": "Nine.",
            "tools": [{"type": "function", "function": TOOL}],
        },
    ),
    "tags": (
        {"formatting": "sharegpt", "columns": COLUMNS, "tags": TAGS | {"system_tag": "sys"}},
        {"messages": [says("sys", "S"), says("user", "<image>Q"), says("assistant", "A")], "images": ["a.png"]},
        {"messages": [says("system", "S"), says("user", [image("a.png"), text("Q")])], "expected": "A"},
    ),
    "openai": (
        {"formatting": "openai", "columns": COLUMNS},
        {"messages": [says("user", "<image>Q"), says("assistant", "A")], "images": ["a.png"]},
        {"messages": [says("user", [image("a.png"), text("Q")])], "expected": "A"},
    ),
    "nothing in some columns": (
        {"columns": {"prompt": "q", "query": "i", "response": "a", "tools": "t", "images": "scans", "history": "h"}},
        {"q": "Q", "i": "", "a": "A", "t": "", "scans": [], "h": []},
        {"messages": [says("user", "Q")], "expected": "A"},
    ),
}  # fmt: skip


def write(folder, entry, *rows):
    (folder / "rows.json").write_text(json.dumps(list(rows)))
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json"} | entry}))
    return folder / "dataset_info.json"


@pytest.mark.parametrize("name", SETS)
def test_a_set_becomes_records(tmp_path, run_cli, name):
    entry, row, record = SETS[name]
    for page in ("a.png", "b.png"):
        make_page(tmp_path / page, ord(page[0]))
    code, out, err = run_cli("reformat_data", write(tmp_path, entry, row, row), tmp_path / "o.jsonl")
    assert code == 0, err
    assert out.splitlines()[:2] == [
        f"{tmp_path / 'rows.json'}: rows of format llama_factory", "2 rows read, 2 written, 0 dropped"
    ]  # fmt: skip
    assert read_rows(tmp_path / "o.jsonl") == [{"id": f"rows-{number}"} | record for number in (1, 2)]


def test_images_are_below_the_folder_of_the_list(tmp_path, run_cli):
    entry = {"file_name": "sub/rows.json", "columns": {"images": "images"}}
    row = {"instruction": "<image>Q", "output": "A", "images": ["sub/a.png"]}
    path = write(tmp_path, entry)
    (tmp_path / "sub").mkdir()
    make_page(tmp_path / "sub/a.png", 1)
    (tmp_path / "sub/rows.json").write_text(json.dumps([row]))
    code, out, err = run_cli("reformat_data", path, tmp_path / "sub/o.jsonl")
    assert code == 0, err
    assert out.splitlines()[-1].endswith(f"give train and predict --images_dir {tmp_path}")


# name: (row of a set with the columns messages and images, reason)
ROWS = {
    "an unnamed column": (
        {"messages": [], "system": "S"},
        "has `system`, which `columns` of dataset_info.json does not name; name it there, or remove it",
    ),
    "an unnamed video": (
        {"messages": [], "videos": ["a.mp4"]},
        "has `videos`, which `columns` of dataset_info.json does not name; name it there, or remove it",
    ),
    "an unknown tag": (
        {"messages": [says("human", "Q")]},
        "turn 1: unknown `role` 'human'; expected user, assistant, observation, function_call, system",
    ),
    "a turn of another shape": (
        {"messages": [{"from": "human", "value": "Q"}]},
        "turn 1: expected an object with `role` and `content`",
    ),
    "no turns": ({"images": ["a.png"]}, "`messages` must be a list with something in it"),
    "a call that is none": (
        {"messages": [says("user", "Q"), says("function_call", "total()")]},
        'a tool call must be JSON as {"name": …, "arguments": …}, not total()',
    ),
    "an image too many": (
        {"messages": [says("user", "<image>Q"), says("assistant", "A")], "images": ["a.png", "b.png"]},
        "number of images: 2, of places for them: 1 (<image> in the user's texts, or image blocks without one); make "
        "them the same",
    ),
    "an image in the answer": (
        {"messages": [says("user", "Q"), says("assistant", "<image>")], "images": ["a.png"]},
        "<image> stands in another's message, not in the user's; move it into the question",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_refused(tmp_path, run_cli, name):
    row, reason = ROWS[name]
    path = write(tmp_path, {"formatting": "sharegpt", "columns": COLUMNS, "tags": TAGS}, row)
    code, _, err = run_cli("reformat_data", path, tmp_path / "o.jsonl")
    assert (code, err.splitlines()[-1]) == (
        2, f"error: {tmp_path / 'rows.json'}: nothing to write, all rows were left out; row 1: {reason}"
    )  # fmt: skip


ENTRIES = {
    "ranking": ({"ranking": True}, "`ranking` is for training on preferences, which is not done here"),
    "chosen": ({"columns": {"chosen": "c"}}, "`chosen`: preferences cannot be trained on here"),
    "KTO": ({"columns": {"kto_tag": "label"}}, "`kto_tag`: preferences cannot be trained on here"),
    "video": ({"columns": {"videos": "v"}}, "`videos`: videos cannot be trained on here"),
    "audio": ({"columns": {"audios": "a"}}, "`audios`: audio cannot be trained on here"),
    "hub": ({"hf_hub_url": "org/set"}, "`hf_hub_url`: give the set on the hub as IN, org/set"),
    "a part": ({"num_samples": 9}, "`num_samples`: remove it, and give --limit"),
    "a script": ({"script_url": "x"}, "`script_url` is not read here; remove it if the rows are the same without"),
    "no file": ({"file_name": None}, "no `file_name`: the file of its rows"),
    "formatting": ({"formatting": "x"}, "unknown `formatting` 'x'; expected alpaca, sharegpt or openai"),
    "a column of another": ({"columns": {"messages": "m"}}, "`messages` is not read for `formatting` alpaca"),
    "a tag": ({"formatting": "sharegpt", "tags": {"x_tag": "x"}}, "`x_tag` is not read for `formatting` sharegpt"),
    "columns": ({"columns": ["q"]}, "`columns` must be an object of names"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_sets_that_are_refused(tmp_path, name):
    entry, reason = ENTRIES[name]
    path = write(tmp_path, entry)
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}: mine: {reason}')}$"):
        find_set(path)


def test_one_set_of_several_is_named(tmp_path, run_cli):
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps({"b": {"file_name": "b.json"}, "a": {"file_name": "a.json"}}))
    for name, reason in (("", "has 2 sets"), (":c", "has no set c")):
        code, _, err = run_cli("reformat_data", f"{path}{name}", tmp_path / "o.jsonl")
        assert (code, err) == (2, f"error: {path}: {reason}; name one, {path}:NAME, of a, b\n")
    code, _, err = run_cli("reformat_data", f"{path}:a", tmp_path / "o.jsonl")
    assert (code, err) == (2, f"error: {tmp_path / 'a.json'}: no such file\n")
    path.write_text(json.dumps({"a": {"file_name": "a.json"}}, indent=1))
    code, _, err = run_cli("validate_data", path)
    assert (code, err) == (
        2, f"error: {path}: is one JSON object, without rows in `data`: python -m reformat_data {path} OUT\n"
    )  # fmt: skip
    (tmp_path / "a.json").write_text('[{"instruction": "Q", "output": "A"}]')
    assert run_cli("reformat_data", tmp_path, tmp_path / "o.jsonl")[0] == 0  # the folder will do
    path.write_text("[]")
    code, _, err = run_cli("reformat_data", path, tmp_path / "o.jsonl")
    assert (code, err.startswith(f"error: {path}: expected {{")) == (2, True)
