"""Score takes any text a record may hold: nothing crashes, acts on the terminal, or is written that is no JSON."""

import json
import os
import subprocess
import sys

import pytest

from mistral_ft.scoring.totals import slice_of
from tests.conftest import ROOT, row, write_jsonl
from tests.helpers.hostile import BAD_LINES, TEXTS, acts_on_a_terminal, read_strictly, rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_jsonl(folder / "p.jsonl", rows())
    write_jsonl(folder / "o.jsonl", [r | {"actual": r.get("expected")} for r in rows()])
    return folder


def is_page(path) -> bool:
    html = path.read_bytes().decode("utf-8")
    return "<script" not in html and not [c for c in html if not c.isprintable() and c not in "\n\xa0"]


def test_every_output(run_cli, files, tmp_path):
    wrong, broken, page = tmp_path / "e.jsonl", tmp_path / "b.jsonl", tmp_path / "r.html"
    code, out, err = run_cli(
        "score", files / "p.jsonl", "-e", wrong, "--report", page, "--by", "kind", "--compare", files / "o.jsonl",
        "--broken", broken,
    )  # fmt: skip
    assert code == 0
    assert acts_on_a_terminal(out) == acts_on_a_terminal(err) == []
    lines = (files / "p.jsonl").read_bytes().split(b"\n")
    for path in (wrong, broken):
        written = path.read_bytes().split(b"\n")[:-1]
        assert written
        assert set(written) <= set(lines)
    assert is_page(page)
    code, out, _ = run_cli("score", files / "p.jsonl", "--json", "--by", "kind", "--compare", files / "o.jsonl")
    assert code == 0
    assert acts_on_a_terminal(out) == []
    # Texts with a \0 come back as they were; those that are cut aside.
    assert TEXTS["control characters"] in read_strictly(out)["slices"]
    assert TEXTS["bidi overrides"] in read_strictly(out)["slices"]


@pytest.mark.parametrize("by", ["meta.a.b", 'meta."a.b"', 'meta.""', "big", "deep", "float", "id", "messages"])
def test_slices_by_any_field(run_cli, files, tmp_path, by):
    code, out, _ = run_cli("score", files / "p.jsonl", "--by", by, "--json")
    assert code == 0
    assert read_strictly(out)["by"] == by


def test_a_path_in_quotes_names_one_field():
    row = {"a": {"b": "nested", "c.d": "dots", "": "empty"}, "a.b": "own", '"x"': "quotes", "e.f": {"g": "both"}}
    paths = ["a.b", '"a.b"', 'a."c.d"', 'a.""', '"x"', '"e.f".g', "e.f.g", "a.c.d", 'a."b', "a."]
    assert [slice_of(row, path, None) for path in paths] == [
        "own", "own", "dots", "empty", "quotes", "both", "(none)", "(none)", "(none)", "empty",
    ]  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_that_is_no_record_is_named(run_cli, tmp_path, line):
    path = write_jsonl(tmp_path / "p.jsonl", [row(0, "A") | {"actual": "A"}])
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    assert run_cli("score", path) == (2, "", f"error: {path}:2: {BAD_LINES[line]}\n")


def test_file_names_of_any_bytes(run_cli, files, tmp_path):
    name = tmp_path / os.fsdecode(b"\xff\x1b[2J\n.jsonl")
    name.write_bytes((files / "p.jsonl").read_bytes())
    page = tmp_path / "r.html"
    code, out, err = run_cli("score", files / "p.jsonl", "--compare", name, "--report", page)
    assert code == 0
    assert acts_on_a_terminal(out) == acts_on_a_terminal(err) == []
    assert r"\udcff\x1b[2J\n.jsonl" in out
    assert is_page(page)
    code, out, _ = run_cli("score", files / "p.jsonl", "--compare", name, "--json")
    assert read_strictly(out.encode().decode())["comparison"]["other"] == str(name)
    code, out, err = run_cli("score", f"{name}x")
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path}/\\udcff\\x1b[2J .jsonlx: no such file\n"
    assert run_cli("validate_data", name, "--report", page)[0] == 1
    assert is_page(page)


def test_json_is_json_on_a_terminal_without_unicode(files, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "score", files / "p.jsonl", "--json", "--by", "kind"],
        cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert done.stdout.isascii()
    assert TEXTS["bidi overrides"] in read_strictly(done.stdout.decode())["slices"]


def test_a_number_in_an_answer_that_no_float_holds_makes_it_plain_text(run_cli, tmp_path):
    rows = [row(0, '{"a": 1e999}') | {"actual": '{"a": 1e998}'}, row(1, '{"a": 1}') | {"actual": '{"a": NaN}'}]
    code, out, _ = run_cli("score", write_jsonl(tmp_path / "p.jsonl", rows), "--json")
    assert code == 0
    assert read_strictly(out)["json"] | {"fields": None} == {
        "count": 1, "valid": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0, "fields": None,
    }  # fmt: skip
    assert json.loads(out)["json"]["fields"].keys() == {"a"}
