"""The review server takes any text a record may hold: every route answers, and what is exported is what was read."""

import json
import os

import pytest

from mistral_ft.data.predictions import PREDICTED
from mistral_ft.errors import UserError
from mistral_ft.review.export import export
from mistral_ft.review.log import ReviewLog, log_path
from mistral_ft.review.shown import json_fields_of
from tests.conftest import TINY, row, write_jsonl
from tests.helpers.hostile import BAD_LINES, TEXTS, read_strictly, rows
from tests.helpers.review import HOST, decide


@pytest.fixture
def path(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", rows())
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in BAD_LINES)
    return path


@pytest.fixture
def client(serve, path, tmp_path):
    other = write_jsonl(tmp_path / "o.jsonl", [r | {"actual": r.get("expected")} for r in rows()])
    return serve(path, other, TINY)


def ask(client, name, status=(200,), **parameters):
    """What a route answers, as JSON."""
    response = client.get(f"/api/{name}", params=parameters)
    assert response.status_code in status, (name, parameters, response.text[:300])
    return read_strictly(response.content.decode("utf-8"))


def test_lists_filters_and_searches(client):
    view = ask(client, "view", count=200)
    assert view["total"] == len(rows())
    assert ask(client, "rows", view=view["view"], count=200)["rows"] == view["first"]
    assert [reason for _, reason in ask(client, "bad_lines")["lines"]] == list(BAD_LINES.values())
    for field in ask(client, "fields")["fields"]:
        for value, count in field["values"][:5]:
            found = ask(client, "view", field=field["name"], value=value)["total"]
            assert found == count, (field["name"], value)
    for text in filter(str.strip, TEXTS.values()):
        assert 4 <= ask(client, "view", text=text[:1000])["total"] < len(rows())
    for sort in ("confidence", "cer", "length", "file"):
        assert ask(client, "view", sort=sort, descending=1)["total"] == len(rows())
    assert ask(client, "find", id=TEXTS["control characters"])["row"] == 5
    for name in ("1e999", "-1e999", "nan", "9" * 5000, "[1]", "\0"):
        assert ask(client, "find", id=name) == {"row": None}
    assert ask(client, "find", id=str(10**300))["row"] == 4


def test_fields_with_like_paths_are_filtered_apart(client):
    names = {field["name"] for field in ask(client, "fields")["fields"]}
    assert {"kind", "meta.a.b", 'meta."a.b"', 'meta.""', "big", "deep", "float"} <= names
    assert all(len(name) <= 200 and name.isprintable() for name in names)
    for name in ('meta."a.b"', 'meta.""', "kind", "meta.a.b"):
        view = ask(client, "view")["view"]
        assert TEXTS["markup"] in ask(client, "scores", view=view, by=name)["slices"]


def test_every_route_of_every_row(client):
    for number in range(len(rows())):
        shown = ask(client, "row", row=number)
        assert shown["expected"] == rows()[number].get("expected")
        ask(client, "images", row=number)
        ask(client, "image", (404, 422), row=number, image=0)
        ask(client, "token_view", (200, 422), row=number)


def test_corrections_come_back_as_they_were_saved(client, path):
    texts = list(TEXTS.values())
    changed = 0
    for number, record in enumerate(rows()):
        text = texts[(number + 5) % len(texts)]
        changed += text != record["expected"]
        answer = decide(client, number, expected=text, reviewed=True)
        assert answer.status_code == 200, answer.text[:300]
        assert read_strictly(answer.content.decode())["row"]["expected"] == text
    for line in log_path(path).read_bytes().decode("utf-8").split("\n")[:-1]:
        read_strictly(line)
    assert ask(client, "view", show="edited")["total"] == changed
    done = client.post("/api/export", json={}, headers={"Origin": HOST})
    assert done.status_code == 200
    found = read_strictly(done.content.decode())
    assert max(map(len, found["left_out"])) <= 300
    left = {int(text.split(":")[0]) for text in found["left_out"]}
    wanted = [
        {k: v for k, v in row.items() if k not in PREDICTED} | {"expected": texts[(number + 5) % len(texts)]}
        for number, row in enumerate(rows())
        if number + 1 not in left
    ]
    lines = (path.parent / "p.corrected.jsonl").read_bytes().decode("utf-8").split("\n")[:-1]
    assert [read_strictly(line) for line in lines] == wanted
    assert [list(read_strictly(line)) for line in lines] == [list(record) for record in wanted]  # in order


def test_what_nobody_corrects_is_exported_as_it_was_read(path, tmp_path):
    with open(path, "a", encoding="utf-8") as file:
        question = '"messages": [{"role": "user", "content": "q"}], "expected": "a"'
        file.write(f'{{{question}, "v": [1e2, 0.10, -0.0, 5e-324, 1.7976931348623157e308]}}\n')
    done = export(path, tmp_path / "x.jsonl")
    left = {int(text.split(":")[0]) for text in done.left_out}
    lines = path.read_bytes().decode("utf-8").split("\n")[:-1]
    wanted = [
        {k: v for k, v in json.loads(line).items() if k not in PREDICTED}
        for number, line in enumerate(lines, 1)
        if number not in left
    ]
    written = (tmp_path / "x.jsonl").read_bytes().decode("utf-8").split("\n")[:-1]
    assert [json.dumps(read_strictly(line)) for line in written] == [json.dumps(record) for record in wanted]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"\xff", 400),
        (b"[" * 100_000, 400),
        (b'{"row": ' + b"9" * 5000 + b"}", 400),
        (b'{"generation": 1e999, "row": NaN}', 400),
        (rb'{"generation":1,"row":0,"version":0,"expected":"\ud800","reviewed":true,"flagged":true}', 400),
        (b'{"generation":1,"row":' + b"9" * 400 + b',"version":0,"expected":null,"reviewed":true,"flagged":true}', 404),
        (b'{"generation":1,"row":0,"version":' + b"9" * 400 + b',"expected":null,"reviewed":true,"flagged":true}', 409),
    ],
)
def test_requests_that_are_refused(serve, tmp_path, body, status):
    client = serve([row(0, "A")])
    headers = {"Origin": HOST, "Content-Type": "application/json"}
    assert client.post("/api/review", content=body, headers=headers).status_code == status
    assert log_path(tmp_path / "p.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    "change",
    [
        r'"row": "zz"',
        '"row": 5',
        f'"row": "{"ab" * 9}"',
        r'"expected": "\ud800"',
        f'"version": {"[" * 10_000}',
        '"flagged": 1e999x',
    ],
)
def test_a_log_that_is_none_is_named(tmp_path, change):
    line = '{"row": "ab", "version": 1, "expected": "x", "reviewed": true, "flagged": false, '
    log_path(tmp_path / "p.jsonl").write_text(f"{line}{change}}}\n")
    with pytest.raises(UserError, match=r"p.jsonl.review.jsonl:1: is no line of a review"):
        ReviewLog(tmp_path / "p.jsonl")


@pytest.mark.parametrize("origin", ["http://[::1", "null", "http://", "\u00ff", "http://a b"])
def test_an_origin_that_is_no_address_is_refused(serve, origin):
    headers = {"Origin": origin.encode("latin-1")}
    assert serve([row(0, "A")]).get("/api/status", headers=headers).status_code == 403


def test_file_names_of_any_bytes(serve, tmp_path):
    path = tmp_path / os.fsdecode(b"\xff\x1b[2J.jsonl")
    write_jsonl(path, [row(0, "A", ["gone.png"]) | {"actual": "B"}])
    client = serve(path)
    assert ask(client, "status")["file"] == path.name
    assert ask(client, "images", row=0)["images"][0]["name"] == "gone.png"
    ask(client, "image", (422,), row=0)
    done = client.post("/api/export", json={}, headers={"Origin": HOST})
    assert read_strictly(done.content.decode())["path"] == str(tmp_path / f"{path.name[:-6]}.corrected.jsonl")


def test_json_in_tools_and_calls_with_half_a_surrogate_pair_or_nan_is_refused(tmp_path):
    ask = {"role": "user", "content": "q"}
    called = [{"function": {"name": "f", "arguments": text}} for text in (r'{"a": "\ud800"}', '{"a": NaN}')]
    tool = r'[{"type": "function", "function": {"name": "f", "description": "\udfff", "parameters": {}}}]'
    records = [{"messages": [ask, {"role": "assistant", "tool_calls": [call]}]} for call in called]
    records += [{"messages": [ask], "expected": "a", "tools": text} for text in (tool, "[1e999]")]
    done = export(write_jsonl(tmp_path / "p.jsonl", [*records, row(0, "A")]), tmp_path / "x.jsonl")
    assert done.left_out == [
        "1: message 2: `arguments` of f are no JSON",
        "2: message 2: `arguments` of f are no JSON",
        "3: `tools` is text that is no JSON",
        "4: `tools` is text that is no JSON",
    ]


def test_fields_of_a_json_answer_have_the_confidence_of_their_own_key():
    expected = r'{"a.b": 1, "a": {"b": 2, "c": [3]}, "": 4, "0": 5, "gone": {"x.y": 6}}'
    actual = r'{"a.b": 1, "a": {"b": 9}, "": 4, "0": 5, "\ud800": 7}'
    keys = {"a.b": 1.0, "a": 0.5, "": 0.25, "0": 0.125, r'"\ud800"': 0.0625}
    logs = {1.0: 0.0, 0.5: -0.6931471805599453, 0.25: -1.3862943611198906, 0.125: -2.0794415416798357}
    logs[0.0625] = -2.772588722239781
    sure = {key: {"min": logs[value]} for key, value in keys.items()}
    found = json_fields_of({"expected": expected, "actual": actual, "confidence": {"fields": sure}})
    assert [[*field[:4], field[4] and round(field[4], 9)] for field in found] == [
        ['"a.b"', "1", "1", True, 1.0],
        ["a.b", "2", "9", False, 0.5],
        ["a.c.0", "3", None, False, 0.5],
        ['""', "4", "4", True, 0.25],
        ['"0"', "5", "5", True, 0.125],
        ['gone."x.y"', "6", None, False, None],
        [r'"\ud800"', None, "7", False, 0.0625],
    ]
