"""Score: the first line, rows that count as wrong, the errors file; no torch."""

import itertools
import json
import math
import random
import re
import subprocess
import sys
from array import array
from collections import Counter

import jiwer
import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.proportion import proportion_confint

from mistral_ft.data.json_fields import fields_of
from mistral_ft.errors import UserError
from mistral_ft.scoring import statistics
from mistral_ft.scoring import totals as scoring
from mistral_ft.scoring.comparison import Comparison, compare
from mistral_ft.scoring.confidence import (
    confidence_of,
    expected_calibration_error,
    reliability,
    review_below,
    risk_coverage,
    threshold_for,
)
from mistral_ft.scoring.metrics import (
    Grade,
    anls,
    fields_to_compare,
    fold,
    grade,
    is_exact,
    is_hit,
    token_f1,
)
from mistral_ft.scoring.mistakes import Common, confusions
from mistral_ft.scoring.statistics import mcnemar, paired_bootstrap, wilson
from mistral_ft.scoring.totals import Options, Totals, figures, score_file
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
    lines = out.splitlines()
    assert lines[0] == "Accuracy = 3/7 = 0.4286 (95 % interval 0.158 to 0.750)"
    assert lines[1].split()[:3] == ["normalised", "accuracy", "0.5714"]
    assert lines[-1] == f"4 wrong records in {tmp_path / 'e.jsonl'}"
    assert err.splitlines() == [
        "Rows with an `error` count as wrong: 1 (lines 6)",
        "Rows whose `actual` is missing or no string count as wrong: 1 (lines 7)",
        "Rows without `expected`, or without `nll` in the case of plain text, are left out: 1 (lines 8)",
    ]
    assert read_rows(tmp_path / "e.jsonl") == [ROWS[1], ROWS[4], ROWS[5], ROWS[6]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"actual": "a"}', "no row has `expected`, or is plain text with `nll`, so there is nothing to score"),
        ("", "no row has `expected`"),
        ('{"expected": "a", "actual": "a"}\n{"expec', ":2: the line ends in the middle of the record"),
        ('{"expected": 3, "actual": "a"}', ":1: `expected` must be a string"),
        ('{"expected": [], "actual": "a"}', ":1: `expected` is an empty list"),
        ('{"expected": ["a", 3], "actual": "a"}', ":1: answer 2 in `expected` must be a string, got the number 3"),
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
        "assert not {'torch', 'transformers', 'matplotlib', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "p.jsonl"], cwd=ROOT, check=True, capture_output=True)


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", ROWS)
    shell = f"{sys.executable} -m score {tmp_path / 'p.jsonl'} | true"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_parts_of_a_large_file_add_up(tmp_path, monkeypatch):
    rows = [ROWS[i % 8] | {"id": i if i else 5} for i in range(200)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    options = Options(by="id", keep_wrong=True, keep_pairing=True, examples=7)
    whole = score_file(path, options)
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 997)
    with open(tmp_path / "wrong.jsonl", "wb") as wrong:
        parts = score_file(path, options, wrong)
    assert parts.totals == whole.totals
    assert parts.with_error == whole.with_error == array("q", range(6, 201, 8))
    assert parts.slices == whole.slices
    assert parts.pairing == whole.pairing
    assert parts.repeated_ids == whole.repeated_ids == [6]
    assert parts.mistakes.kinds == whole.mistakes.kinds == {"form": 25, "empty": 25, "error": 25, "unanswered": 25}
    assert parts.mistakes.words == whole.mistakes.words == Common(Counter({("B", "b"): 25}))
    assert parts.mistakes.examples == sorted(whole.mistakes.examples, reverse=True)
    assert [rows[shown["line"] - 1]["id"] for _, _, shown in parts.mistakes.examples] == [
        int(shown["id"]) for _, _, shown in parts.mistakes.examples
    ]
    assert len(parts.mistakes.examples) == 7
    assert read_rows(tmp_path / "wrong.jsonl") == [r for r in rows if r.get("expected") is not None and not is_hit(r)]
    path.write_text(path.read_text() + "{")
    with pytest.raises(UserError, match=r"p.jsonl:201: not one JSON object per line"):
        score_file(path, Options())


PAIRS = [
    ("Decree 12", "Decree 12"), ("Decree 13", "Decree 12"), ("", "abc"), ("a b c d", "a x c"), ("Ångström", "Angstrom"),
    ("one two three", "three two one"), ("the quick brown", "quick brown fox"), ("12.50 €", "12,50 €"),
]  # fmt: skip


def test_error_rates_equal_those_of_jiwer():
    actual, expected = [a for a, _ in PAIRS], [e for _, e in PAIRS]
    totals = Totals()
    for a, e in PAIRS:
        totals.add(grade({"expected": e, "actual": a}), None, None)
    assert figures(totals)["cer"] == pytest.approx(jiwer.cer(expected, actual))
    assert figures(totals)["wer"] == pytest.approx(jiwer.wer(expected, actual))


@pytest.mark.parametrize(
    ("actual", "expected", "value"),
    [
        ("abcd", "abcd", 1.0),
        ("ABCD", "abcd", 1.0),  # capitals do not count
        ("abc", "abcd", 0.75),  # one edit of four
        ("ab", "abcd", 0.0),  # NL is 0.5, which is not below the threshold
        ("abxyz", "abcde", 0.0),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("decree 12", "decree 13", 1 - 1 / 9),
    ],
)
def test_anls_of_hand_computed_cases(actual, expected, value):
    assert anls(actual, expected) == pytest.approx(value)


@pytest.mark.parametrize(
    ("actual", "expected", "value"),
    [
        ("The Town Clocks!", "town clocks", 1.0),  # articles, capitals and punctuation do not count
        ("town hall", "town clocks", 0.5),
        ("a town", "an old town", 2 / 3),  # 1 shared of 1 and 2 words
        ("town town", "town", 2 / 3),
        ("the", "a", 1.0),  # both without words
        ("the", "town", 0.0),
        ("road", "town", 0.0),
    ],
)
def test_token_f1_of_hand_computed_cases(actual, expected, value):
    assert token_f1(actual, expected) == pytest.approx(value)


def test_folding_makes_equal_what_it_is_asked_to():
    assert fold("  E\u0301tude  No\t1 ") == fold("étude no 1")
    assert fold("A", ("space",)) != fold("a", ("space",))
    assert fold("e\u0301", ("case",)) != fold("é", ("case",))
    assert fold("a  b", ("nfc",)) != fold("a b", ("nfc",))


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (3, 7), (24, 24), (0, 24), (860, 1000), (1, 10**6)])
def test_wilson_equals_statsmodels(hits, count):
    assert wilson(hits, count) == pytest.approx(proportion_confint(hits, count, method="wilson"), abs=1e-12)


@pytest.mark.parametrize("count", [1, 12, 24, 10**6])
def test_no_interval_leaves_its_share_out(count):
    assert wilson(0, count)[0] == 0
    assert wilson(count, count)[1] == 1


@pytest.mark.parametrize(("fixed", "broken"), [(0, 0), (1, 0), (10, 2), (2, 10), (5, 5), (300, 240)])
def test_mcnemar_equals_statsmodels(fixed, broken):
    assert mcnemar(fixed, broken) == pytest.approx(statsmodels_mcnemar([[9, fixed], [broken, 9]], exact=True).pvalue)


@pytest.mark.parametrize("most_drawn", [10_000, 500])
def test_the_bootstrap_interval_holds_what_it_should(monkeypatch, most_drawn):
    monkeypatch.setattr(statistics, "MOST_DRAWN", most_drawn)

    def model(wrong, rows=1000):  # one edit in each of the first rows, of 10 characters each
        numerators = np.zeros((rows, 2))
        numerators[:wrong] = 1
        return numerators, np.full((rows, 2), 10.0)

    (difference, low, high), second = paired_bootstrap(model(200), model(100))
    assert second == (difference, low, high)
    assert difference == pytest.approx(-0.01)
    # 100 rows of 1000 changed, so those drawn are binomial: 100 ± 1.96 · 9.5, over 10,000 characters.
    assert low == pytest.approx(-0.0119, abs=0.0003)
    assert high == pytest.approx(-0.0081, abs=0.0003)
    assert paired_bootstrap(model(20), model(20))[0] == (0, 0, 0)


def json_figures(*rows):
    totals = Totals()
    for expected, actual in rows:
        totals.add(grade({"expected": expected, "actual": actual}), fields_of(expected), fields_of(actual))
    return figures(totals)["json"]


def test_fields_of_json_answers():
    wanted = '{"number": "A-1", "total": 12.0, "lines": [{"price": 3}, {"price": 4}]}'
    result = json_figures(
        (wanted, '{"lines":[{"price":3},{"price":5}],"total":12,"number":" A-1","x":1}'),
        (wanted, '{"number": "A-1", "total": '),
    )
    assert (result["count"], result["valid"]) == (2, 0.5)
    assert {path: (part["accuracy"], part["count"]) for path, part in result["fields"].items()} == {
        "number": (0.5, 2),
        "total": (0.5, 2),
        "lines.0.price": (0.5, 2),
        "lines.1.price": (0.0, 2),
    }
    assert result["precision"] == 3 / 5  # five fields were answered, three of them right
    assert result["recall"] == 3 / 8
    assert result["f1"] == pytest.approx(2 * 3 / 13)


def test_fields_are_bounded(monkeypatch):
    monkeypatch.setattr(scoring, "MOST_FIELDS", 2)
    result = json_figures(('{"a": 1, "b": 2, "c": 3, "d": 4}', '{"a": 1, "c": 3}'))
    assert {path: (part["accuracy"], part["count"]) for path, part in result["fields"].items()} == {
        "a": (1.0, 1),
        "b": (0.0, 1),
        "(other fields)": (0.5, 2),
    }
    assert (result["precision"], result["recall"]) == (1.0, 0.5)


def test_slices_worst_first(tmp_path, run_cli):
    rows = [{"id": i, "meta": {"kind": "ab"[i % 2]}, "expected": "x" * (i + 8), "actual": "x" * 8} for i in range(4)]
    path = write_jsonl(tmp_path / "p.jsonl", [*rows, {"id": 9, "expected": "y", "actual": "y"}])
    out = run_cli("score", path, "--by", "meta.kind")[1].splitlines()
    assert out[-4:] == [
        "By meta.kind, worst first:",
        "b       0.0000  (0.000 to 0.658)  0/2",
        "a       0.5000  (0.095 to 0.905)  1/2",
        "(none)  1.0000  (0.207 to 1.000)  1/1",
    ]
    out = run_cli("score", path, "--by", "answer_length")[1].splitlines()
    assert out[-2:] == [
        "up to 20 characters  0.0000  (0.000 to 0.793)  0/1",
        "up to 10 characters  0.5000  (0.150 to 0.850)  2/4",
    ]


def test_slices_by_page_size(pages, tmp_path, run_cli):
    rows = [r | {"actual": "Paris"} for r in read_rows(pages / "train.jsonl")]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    out = run_cli("score", path, "--by", "page_size", "--images_dir", pages)[1].splitlines()
    assert out[-2:] == [
        "up to 0.5 megapixels  0.0000  (0.000 to 0.354)  0/7",
        "no page               1.0000  (0.207 to 1.000)  1/1",
    ]


def compare_files(first, second) -> Comparison:
    return compare(*(score_file(path, Options(keep_pairing=True)) for path in (first, second)), (first, second))


def predictions(tmp_path, name, answers):
    return write_jsonl(tmp_path / name, [row(i, "right") | {"actual": a} for i, a in enumerate(answers)])


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (["wrong"] * 8, ["right"] * 8, "better"),
        (["right"] * 8, ["wrong"] * 8, "worse"),
        (["wrong"] * 2, ["right"] * 2, "cannot tell"),
        (["right"] * 5, ["right"] * 5, "cannot tell"),
    ],
)
def test_verdict(tmp_path, before, after, verdict):
    found = compare_files(predictions(tmp_path, "a.jsonl", before), predictions(tmp_path, "b.jsonl", after))
    assert found.verdict == verdict
    assert found.count == len(before)


def test_comparison_lists_what_changed(tmp_path, run_cli):
    before = predictions(tmp_path, "a.jsonl", ["right", "wrong", "right", "rigth"])
    after = predictions(tmp_path, "b.jsonl", ["right", "right", "wrong", "rigth"])
    code, out, _ = run_cli("score", after, "--compare", before, "--broken", tmp_path / "broken.jsonl", "--json")
    assert code == 0
    found = json.loads(out)["comparison"]
    assert (found["p_value"], found["verdict"]) == (1.0, "cannot tell")
    assert found["fixed"] == [{"line": 2, "other_line": 2, "id": 1}]
    assert found["broken"] == [{"line": 3, "other_line": 3, "id": 2}]
    assert found["differences"]["anls"]["verdict"] == "cannot tell"
    assert [r["id"] for r in read_rows(tmp_path / "broken.jsonl")] == [2]


def test_rows_are_matched_by_prompt_where_they_have_no_id(tmp_path):
    rows = [{"messages": [{"role": "user", "content": str(i)}], "expected": "a", "actual": "a"} for i in range(3)]
    before = write_jsonl(tmp_path / "a.jsonl", rows)
    after = write_jsonl(tmp_path / "b.jsonl", rows[::-1][:2])
    found = compare_files(before, after)
    assert (found.count, found.left_out) == (2, 1)
    rows[0]["actual"] = "b"
    found = compare_files(write_jsonl(before, rows), after)
    assert (found.fixed, found.broken) == ([], [])
    rows[1]["actual"] = "b"
    assert compare_files(write_jsonl(before, rows), after).fixed == [(2, 2)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda rows: [*rows, rows[0]],
            r"b.jsonl:4: has the id \(or, without one, the prompt\) of line 1; rows to compare need different ones",
        ),
        (lambda rows: [r | {"id": r["id"] + 100} for r in rows], "share no row that can be scored"),
        (
            lambda rows: [r | {"expected": "other"} for r in rows],
            r"a.jsonl:1 and .*b.jsonl:1 are the same record but expect different answers",
        ),
    ],
)
def test_files_that_cannot_be_compared_are_refused(tmp_path, change, reason):
    before = predictions(tmp_path, "a.jsonl", ["right"] * 3)
    after = write_jsonl(tmp_path / "b.jsonl", change(read_rows(before)))
    with pytest.raises(UserError, match=reason):
        compare_files(before, after)


def test_fail_under_is_an_exit_code(tmp_path, run_cli):
    path = predictions(tmp_path, "a.jsonl", ["right", "wrong"])
    assert run_cli("score", path, "--fail_under", "0.5")[0] == 0
    code, _, err = run_cli("score", path, "--fail_under", "0.51")
    assert (code, err) == (1, "The accuracy is below --fail_under 0.51\n")
    assert run_cli("score", path, "--fail_under", "90")[0] == 2
    assert run_cli("score", path, "--broken", "x")[0] == 2


def test_no_file_is_written_over(tmp_path, run_cli):
    path = predictions(tmp_path, "a.jsonl", ["right", "wrong"])
    before = path.read_bytes()
    for arguments in (["-e", path], ["--compare", path], ["-e", tmp_path / "b", "--compare", path, "--broken", path]):
        code, _, err = run_cli("score", path, *arguments)
        assert (code, err) == (2, "error: two of the files are the same one (see python -m score --help)\n")
    assert path.read_bytes() == before


def sure_rows(count, seed=0, first=0):
    """Rows whose least sure token has probability p and that are right in p of the cases."""
    rng = random.Random(seed)
    rows = []
    for i in range(first, first + count):
        p = rng.uniform(0.3, 1)
        sure = {"sum": 2 * math.log(p), "mean": math.log(p) / 2, "min": math.log(p), "tokens": 4}
        rows.append(row(i, "right") | {"actual": "right" if rng.random() < p else "wrong", "confidence": sure})
    return rows


def test_confidence_of_a_row():
    sure = {"confidence": {"sum": math.log(0.25), "mean": math.log(0.5), "min": math.log(0.4), "tokens": 2}}
    assert confidence_of(sure) == pytest.approx(0.4)
    assert confidence_of(sure, "mean") == pytest.approx(0.5)
    assert confidence_of(sure, "sum") == pytest.approx(0.25)
    assert confidence_of({"confidence": {"min": 1e-9}}) == 1.0
    assert (
        confidence_of({"confidence": {"min": -math.inf}}) == confidence_of({"confidence": {"min": -(10**400)}}) == 0.0
    )


@pytest.mark.parametrize("value", [None, "high", math.nan, math.inf, 0.93, 10**400, True, [], {}])
def test_what_is_no_confidence(value):
    assert confidence_of({"confidence": {"min": value}}) is None
    assert confidence_of({"confidence": value}) is None


def test_reliability_of_hand_computed_rows():
    bins = reliability([0.9, 0.1, 0.8, 0.2], [1, 0, 0, 1], bins=2)
    assert [(b.count, round(b.confidence, 6), b.accuracy) for b in bins] == [(2, 0.15, 0.5), (2, 0.85, 0.5)]
    assert (bins[0].low, bins[0].high) == wilson(1, 2)
    assert expected_calibration_error(bins) == pytest.approx(0.35)


def test_reliability_does_not_depend_on_the_order_of_rows():
    bins = reliability([0.5] * 10, [0] * 5 + [1] * 5)
    assert [(b.count, b.confidence, b.accuracy) for b in bins] == [(10, 0.5, 0.5)]
    assert expected_calibration_error(bins) == 0
    assert [b.count for b in reliability([0.5, 0.1, 0.5, 0.5], [1, 1, 0, 0], bins=4)] == [1, 3]
    assert [b.count for b in reliability([0.5], [1])] == [1]


@pytest.mark.parametrize(
    ("right", "target", "share", "accuracy"),
    [
        ([1, 1, 1, 1], 0.99, 0.0, 1.0),
        ([1, 1, 0, 1], 0.99, 0.5, 1.0),  # all from the wrong one down
        ([1, 1, 0, 1], 0.75, 0.0, 0.75),
        ([0, 1, 1, 1], 0.75, 0.0, 0.75),
        ([0, 0, 0, 0], 0.5, 1.0, None),
    ],
)
def test_share_to_review(right, target, share, accuracy):
    sure = [0.9, 0.8, 0.7, 0.6]
    found = review_below(sure, right, threshold_for(sure, right, target))
    assert (found.share, found.accuracy) == (share, accuracy)


def test_rows_of_one_confidence_are_reviewed_together():
    assert threshold_for([0.9, 0.5, 0.5], [1, 1, 0], 0.99) == 0.9
    assert review_below([0.9, 0.5, 0.5], [1, 1, 0], 0.9).share == pytest.approx(2 / 3)


def test_risk_coverage_of_hand_computed_rows():
    curve = risk_coverage([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 1])
    assert curve.coverage == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    assert curve.confidence == [0.9, 0.8, 0.7, 0.6]
    assert curve.area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert curve.area_random == 0.25
    assert curve.area_best == pytest.approx((0 + 0 + 0 + 1 / 4) / 4)


def test_answers_of_one_confidence_count_as_in_random_order():
    sure, right = [0.9, 0.5, 0.5, 0.5, 0.2], [1, 1, 0, 0, 1]
    curve = risk_coverage(sure, right)
    assert curve.coverage == [0.2, 0.8, 1.0]
    areas = []
    for order in itertools.permutations([1, 0, 0]):
        wrong = np.cumsum(1 - np.array([1, *order, 1]))
        areas.append((wrong / np.arange(1, 6)).mean())
    assert curve.area == pytest.approx(np.mean(areas))


def test_a_long_curve_has_about_a_hundred_points():
    rng = random.Random(0)
    sure = [rng.random() for _ in range(5000)]
    curve = risk_coverage(sure, [rng.random() < p for p in sure])
    assert len(curve.coverage) == len(curve.risk) == len(curve.confidence) == 100
    assert curve.coverage[0] == 0.01
    assert (curve.coverage[-1], curve.risk[-1]) == (1.0, pytest.approx(curve.area_random))
    assert curve.area_best < curve.area < curve.area_random


def test_calibration_mends_an_overconfident_model(tmp_path, run_cli):
    rows = sure_rows(2000)
    for r in rows:  # says the square root of what is true
        r["confidence"]["min"] /= 2
    half, other = write_jsonl(tmp_path / "a.jsonl", rows[:1000]), write_jsonl(tmp_path / "b.jsonl", rows[1000:])
    before = json.loads(run_cli("score", half, "--json")[1])["confidence"]
    after = json.loads(run_cli("score", half, "--json", "--calibrate_on", other)[1])["confidence"]
    assert before["expected_calibration_error"] > 0.1
    assert after["expected_calibration_error"] < 0.05


def test_the_sentence_and_the_table(tmp_path, run_cli):
    path = write_jsonl(tmp_path / "a.jsonl", sure_rows(1000))
    out = run_cli("score", path, "--target", "0.9")[1]
    assert "Confidence (min, not calibrated) of 1000 answers, the least sure first:" in out
    share, accuracy = re.search(r"Review the least sure ([\d.]+)% .* the rest is ([\d.]+)% right", out).groups()
    # p is uniform in 0.3..1: above 0.8 the mean is 0.9, which leaves 5/7 of the rows for review.
    assert 60 < float(share) < 80
    assert float(accuracy) >= 90


def test_calibrating_on_the_same_rows_is_refused(tmp_path, run_cli):
    path, other = write_jsonl(tmp_path / "a.jsonl", sure_rows(20)), write_jsonl(tmp_path / "b.jsonl", sure_rows(5))
    code, _, err = run_cli("score", path, "--calibrate_on", other)
    assert code == 2
    assert ": 5 of the records are also in the file to be scored; use other ones" in err


def test_ids_that_start_anew_are_no_sign_of_the_same_rows(tmp_path, run_cli):
    path, others = write_jsonl(tmp_path / "a.jsonl", sure_rows(20)), sure_rows(20)
    for r in others:
        r["messages"] = [{"role": "user", "content": "other"}]
    assert run_cli("score", path, "--calibrate_on", write_jsonl(tmp_path / "b.jsonl", others))[0] == 0


def test_the_threshold_learned_elsewhere_is_judged_here(tmp_path, run_cli):
    def rows(right, first):
        sure = [0.9, 0.8, 0.7, 0.6]
        return [
            row(first + i, "a") | {"actual": "a" if hit else "b", "confidence": {"min": math.log(sure[i])}}
            for i, hit in enumerate(right)
        ]

    here = write_jsonl(tmp_path / "a.jsonl", rows([1, 0, 1, 1], 0))
    other = write_jsonl(tmp_path / "b.jsonl", rows([1, 1, 1, 0], 10))
    alone = json.loads(run_cli("score", here, "--json")[1])["confidence"]["review"]
    assert (alone["share"], alone["accuracy"]) == (0.75, 1.0)
    learned = json.loads(run_cli("score", here, "--json", "--calibrate_on", other)[1])["confidence"]["review"]
    assert (learned["share"], learned["accuracy"], learned["count"]) == (0.25, 2 / 3, 3)
    assert learned["threshold"] == pytest.approx(0.7)
    out = run_cli("score", here, "--calibrate_on", other)[1]
    assert (
        "Review the least sure 25.0% (confidence below 0.7000 before calibration), and the rest is 66.7% right" in out
    )


@pytest.mark.parametrize(
    ("expected", "actual", "characters", "words"),
    [
        ("Decree 12", "Decree 17", [("2", "7")], [("12", "17")]),
        ("Decree 12 on Salt", "Decree on Salt", [], [("12", "")]),
        ("Decree 12", "Decree No. 12", [], [("", "No.")]),
        ("modern oil", "modem oil", [("r", "m"), ("n", "")], [("modern", "modem")]),
        ("yes", "no", [], [("yes", "no")]),  # too unlike for its letters to be misread ones
        ("", "a", [], [("", "a")]),
        ("e\u0301tat", "état", [], []),
        ("x" * 65, "x" * 64 + "y", [("x", "y")], []),  # a word too long to be common
    ],
)
def test_confusions_of_hand_aligned_answers(expected, actual, characters, words):
    assert confusions(expected, actual) == (characters, words)


def test_what_is_rare_is_forgotten_and_said_so(monkeypatch):
    monkeypatch.setattr(Common, "keep", 2)
    common = Common()
    for thing in "aaabbcde":
        common.merge([thing])
    assert common.most_common(2) == [("a", 3), ("b", 2)]
    assert len(common.counts) <= 4
    assert common.missed == 1  # c, d and e were seen once each when the rarest were dropped


def test_wrong_answers_by_kind_and_what_they_confuse(tmp_path, run_cli):
    rows = [
        row(0, "Decree 12") | {"actual": "Decree 17"},
        row(1, "Decree 12") | {"actual": "decree 12"},
        row(2, "Decree 12") | {"actual": "Decree", "finish_reason": "length"},
        row(3, "Decree 12") | {"actual": " "},
        row(4, "Decree 12") | {"actual": "On Salt"},
        row(5, "Decree 12") | {"error": "x", "actual": "Decree 12"},
        row(6, "Decree 12") | {"error": None, "actual": "Decree 12"},
        row(7, "Decree 12"),
        row(8, "Decree 12") | {"actual": "", "thinking": "Hm", "finish_reason": "length"},
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    wrong = json.loads(run_cli("score", path, "--json")[1])["wrong"]
    assert wrong["kinds"] == {
        "error": 1, "unanswered": 1, "empty": 1, "length": 2, "form": 1, "near": 1, "different": 1,
    }  # fmt: skip
    assert wrong["characters"]["replaced"] == [
        {"expected": "2", "answered": "7", "count": 1},
        {"expected": "D", "answered": "d", "count": 1},
    ]
    assert wrong["words"]["missing"] == [{"expected": "12", "count": 1}]
    assert wrong["counts_too_low_by"] == {"characters": 0, "words": 0}
    out = run_cli("score", path)[1]
    assert '\nreplaced characters: "2" → "7" ×1, "D" → "d" ×1\nreplaced words: ' in out
    assert '\nmissing words: "12" ×1\n' in out
    assert "extra words" not in out
    assert "\n2  cut off at the length limit: raise predict's --max_new_tokens\n" in out
    assert "wrong answers" not in run_cli("score", write_jsonl(path, rows[6:7]))[1]


def test_rows_without_an_answer_are_worth_nothing():
    # Not even where the empty answer would score: two texts without words, two empty ones.
    for expected in ("the", ""):
        graded = grade({"expected": expected, "error": "image gone"})
        assert (graded.hit, graded.folded_hit, graded.anls, graded.token_f1) == (False, False, 0, 0)


def test_ids_of_any_kind(tmp_path, run_cli):
    ids = [None, None, 1, "1", 1.5, True, [], {"a": 1, "b": 2}, {"b": 2, "a": 1}, 1]
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": id, "expected": "a", "actual": "a"} for id in ids])
    assert run_cli("score", path)[2] == (
        "Rows with an id that stands in the file before count like any other: 2 (lines 9, 10)\n"
    )


@pytest.mark.parametrize(
    ("by", "slices"),
    [
        ("meta.tags", ["(none)", '["x", "y"]', '{"z": 1}', "true", r"a\x1b[2J\u202e", "dotted"]),
        ("meta", ["(none)", '{"tags": ["x", "y"]}', '{"tags": true}', '{"tags": {"z": 1}}']),
    ],
)
def test_slices_by_fields_of_any_kind(tmp_path, run_cli, by, slices):
    tags = (["x", "y"], {"z": 1}, True, "a\x1b[2J\u202e")
    rows = [{"expected": "a", "actual": "b", "meta": {"tags": tag}} for tag in tags]
    rows += [{"expected": "a", "actual": "b", "meta": None}, {"expected": "a", "actual": "b", "meta.tags": "dotted"}]
    out = run_cli("score", write_jsonl(tmp_path / "p.jsonl", rows), "--by", by)[1]
    found = [line.split("  ")[0] for line in out[out.index(f"By {by}") :].splitlines()[1:]]
    assert set(slices) <= set(found)


def test_slices_that_say_nothing_are_refused(tmp_path, run_cli, monkeypatch):
    path = write_jsonl(tmp_path / "p.jsonl", ROWS)
    assert "--by kin: no row of" in run_cli("score", path, "--by", "kin")[2]
    monkeypatch.setattr(scoring, "MOST_SLICES", 5)
    assert "--by id: more than 5 values; slice by a field with fewer" in run_cli("score", path, "--by", "id")[2]


def test_messages_that_are_none_have_no_page_size(tmp_path, run_cli):
    rows = [
        {"expected": "a", "actual": "b", "messages": messages}
        for messages in ("text", [1], {"a": 1}, [{"role": "user", "content": [{"type": "image", "image": 3}]}])
    ]
    out = run_cli("score", write_jsonl(tmp_path / "p.jsonl", rows), "--by", "page_size")[1]
    assert out.splitlines()[-1] == "page cannot be opened  0.0000  (0.000 to 0.490)  0/4"


def test_flags_that_could_not_act_are_refused(tmp_path, run_cli):
    path = predictions(tmp_path, "a.jsonl", ["right", "wrong"])
    other = write_jsonl(tmp_path / "b.jsonl", sure_rows(5, first=10))
    for flags in (["--target", "0.9"], ["--confidence", "sum"], ["--calibrate_on", other]):
        code, _, err = run_cli("score", path, *flags)
        assert code == 2
        assert err.endswith("a.jsonl: no row has a usable `confidence`, so nothing can be said about review\n")
    assert (
        "a.jsonl: no row has a usable `confidence` to calibrate on"
        in (run_cli("score", other, "--calibrate_on", path)[2])
    )
    assert "--images_dir has no effect without --by page_size" in run_cli("score", path, "--images_dir", ".")[2]
    assert "/dev/null: is a device or a pipe; give a file" in run_cli("score", path, "-e", "/dev/null")[2]


def test_nothing_is_written_if_a_later_step_fails(tmp_path, run_cli):
    path = predictions(tmp_path, "a.jsonl", ["right", "wrong"])
    other = write_jsonl(tmp_path / "b.jsonl", [row(99, "a") | {"actual": "a"}])
    code, out, err = run_cli("score", path, "-e", tmp_path / "e.jsonl", "--compare", other)
    assert (code, out) == (2, "")
    assert "share no row that can be scored" in err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


# (right answers, answer): the grade, computed by hand.
SEVERAL = [
    (["12 May 1990", "12.05.1990"], "12.05.1990", Grade(True, True, 0, 10, 0, 1, 1.0, 1.0)),
    (["12 May 1990", "12.05.1990"], "12.05.1991", Grade(False, False, 1, 10, 3, 3, 0.9, 0.0)),  # words: 3/3 and 1/1
    (["X", "Paris"], " paris", Grade(False, True, 1, 5, 1, 1, 1.0, 1.0)),
    # Edits per character: 3/3 and 2/4, per word: 1/1 and 1/2; ANLS 0 and 1 - 2/4, which is not below the threshold.
    (["abc", "x yz"], "x ab", Grade(False, False, 2, 4, 1, 2, 0.0, 0.5)),
    (["", "ab"], "ac", Grade(False, False, 1, 2, 1, 1, 0.0, 0.0)),
    (["", "ab"], "", Grade(True, True, 0, 0, 0, 0, 1.0, 1.0)),
    (["a b", "abcd"], None, Grade(False, False, 3, 3, 2, 2, 0.0, 0.0)),
    # Edits per character: 4/7 and 8/14, the first of equals; F1: 2/4 and 4/5.
    (["one two", "two three four"], "three two", Grade(False, False, 4, 7, 1, 2, 1 - 4 / 9, 0.8)),
]


@pytest.mark.parametrize(("expected", "actual", "worth"), SEVERAL)
def test_of_several_right_answers_the_best_counts(expected, actual, worth):
    given = {"expected": expected} | ({} if actual is None else {"actual": actual})
    assert grade(given) == worth
    assert is_hit(given) is worth.hit


FORMS = ['{"sum": 4, "tax": 1}', '{"sum": 4, "net": 3, "currency": "EUR"}', "none"]


@pytest.mark.parametrize(
    ("actual", "wanted", "found"),
    [
        (FORMS[0], {"sum": "4", "tax": "1"}, {"sum": "4", "tax": "1"}),
        (
            '{"currency": "EUR", "net": 3}',
            {"sum": "4", "net": "3", "currency": '"EUR"'},
            {"currency": '"EUR"', "net": "3"},
        ),
        ("None", None, None),  # nearest to the one that is no JSON
        ('{"sum": 4, "tax": 1', {"sum": "4", "tax": "1"}, None),
        (None, {"sum": "4", "tax": "1"}, None),
    ],
)
def test_fields_are_compared_with_the_answer_that_has_most_of_them(actual, wanted, found):
    given = {"expected": FORMS} | ({} if actual is None else {"actual": actual})
    assert fields_to_compare(given) == (wanted, found)


def test_several_right_answers_in_a_file(tmp_path, run_cli):
    rows = [
        row(0, ["A", "B"]) | {"actual": "B"},
        row(1, ["stone bridge", "Bridge of stone"]) | {"actual": "Bridge of stona"},
        row(2, ["D"]) | {"actual": "E"},
        row(3, FORMS[:2]) | {"actual": FORMS[1]},
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    code, out, err = run_cli("score", path, "-e", tmp_path / "e.jsonl", "--json", "--by", "answer_length")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["hits"], found["count"]) == (2, 4)
    assert found["cer"] == (0 + 1 + 1 + 0) / (1 + 15 + 1 + 39)
    assert found["wer"] == (0 + 1 + 1 + 0) / (1 + 3 + 1 + 6)
    assert found["json"]["count"] == found["json"]["f1"] == 1
    assert list(found["json"]["fields"]) == ["sum", "net", "currency"]
    assert found["wrong"]["words"]["replaced"] == [
        {"expected": "D", "answered": "E", "count": 1}, {"expected": "stone", "answered": "stona", "count": 1},
    ]  # fmt: skip
    assert {name: part["count"] for name, part in found["slices"].items()} == {
        "up to 10 characters": 2, "up to 20 characters": 2,
    }  # fmt: skip
    assert read_rows(tmp_path / "e.jsonl") == rows[1:3]


def test_a_list_of_one_scores_as_its_string(tmp_path, run_cli):
    strings = write_jsonl(tmp_path / "a.jsonl", ROWS)
    lists = write_jsonl(
        tmp_path / "b.jsonl", [r | ({"expected": [r["expected"]]} if "expected" in r else {}) for r in ROWS]
    )
    arguments = ("--json", "--by", "answer_length")
    assert run_cli("score", strings, *arguments) == run_cli("score", lists, *arguments)
    found = compare_files(strings, lists)
    assert (found.count, found.before, found.after) == (7, 3, 3)


def test_files_with_other_right_answers_are_not_compared(tmp_path):
    files = [
        write_jsonl(tmp_path / f"{k}.jsonl", [row(0, expected) | {"actual": "A"}])
        for k, expected in enumerate((["A", "B"], ["A", "B", "A"], ["A"]))
    ]
    assert compare_files(files[0], files[1]).count == 1
    with pytest.raises(UserError, match="are the same record but expect different answers; compare on the same data"):
        compare_files(files[0], files[2])
