"""Score: the first line, rows that count as wrong, the errors file; no torch."""

import subprocess
import sys

import pytest

from mistral_ft.metrics import is_exact
from tests.conftest import ROOT, read_rows, row, write_jsonl

ROWS = [
    row(0, "A") | {"actual": "A"},
    row(1, "B") | {"actual": "b"},
    row(2, " C\n") | {"actual": "C"},
    row(3, "") | {"actual": ""},
    row(4, "D") | {"actual": ""},
    row(5, "E") | {"error": "image gone"},
    row(6, "F"),
    row(7) | {"actual": "G"},
]


def test_the_first_line_and_every_row_that_needs_a_word(tmp_path, run_cli):
    code, out, err = run_cli("score", write_jsonl(tmp_path / "p.jsonl", ROWS), "-e", tmp_path / "e.jsonl")
    assert code == 0
    assert out == f"Accuracy = 3/7 = 0.4286\n4 wrong records in {tmp_path / 'e.jsonl'}\n"
    assert err.splitlines() == [
        "1 rows have an `error`, so they count as wrong: lines 6",
        "1 rows have no `actual`, so they count as wrong: lines 7",
        "1 rows have no `expected`, so they are left out: lines 8",
    ]
    assert read_rows(tmp_path / "e.jsonl") == [ROWS[1], ROWS[4], ROWS[5], ROWS[6]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"actual": "a"}', "no row has `expected`, so there is nothing to score against"),
        ("", "no row has `expected`"),
        ('{"expected": "a", "actual": "a"}\n{"expec', ":2: the line ends in the middle of the record"),
        ('{"expected": 3, "actual": "a"}', ":1: `expected` must be a string"),
    ],
)
def test_files_that_cannot_be_scored_are_refused(tmp_path, run_cli, text, reason):
    (tmp_path / "p.jsonl").write_text(text)
    code, out, err = run_cli("score", tmp_path / "p.jsonl", "-e", tmp_path / "e.jsonl")
    assert (code, out) == (2, "")
    assert reason in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "e.jsonl").exists()


def test_white_space_around_answers_does_not_count():
    assert is_exact("A b", " A b\n")
    assert not is_exact("A  b", "A b")
    assert not is_exact("a", "A")
    assert is_exact("", " ")


def test_score_starts_without_torch(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", ROWS)
    code = (
        "import runpy, sys; sys.argv = ['score.py', sys.argv[1]]\n"
        "try: runpy.run_module('score', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "p.jsonl"], cwd=ROOT, check=True, capture_output=True)


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", ROWS)
    shell = f"{sys.executable} -m score {tmp_path / 'p.jsonl'} | true"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
