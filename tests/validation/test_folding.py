"""Problems that repeat are folded: the first few in full, of the others a count and lines; memory does not grow."""

import itertools
import json
import random

import pytest

from mistral_ft.validation.checker import IMAGE, LINE, MIXED, RECORD, SMALL, Place, Problem
from mistral_ft.validation.folding import Folds


def fold(*problems: Problem, lines=None) -> tuple[list[int], list[str]]:
    """Lines of the problems that are printed in full, and what stands for the others."""
    folds = Folds()
    lines = list(lines or range(1, len(problems) + 1))
    full = [line for line, p in zip(lines, problems, strict=True) if folds.add(Place("a.jsonl", line), p)]
    return full, [f"{place}: {problem.text}" for place, problem in folds.rests()]


def missing(name: str) -> Problem:
    return Problem(IMAGE, f"image data/{name} does not exist", f"data/{name}")


@pytest.mark.parametrize(
    ("texts", "last"),
    [
        (["not JSON: Expecting value at column 1", "not JSON: Expecting value at column 17"], None),
        (
            ["unknown role 'human'; expected", "unknown role 'a\\'b c'; expected", 'unknown role "it\'s"; expected'],
            None,
        ),
        (["the user's last 'x', got 1", "the user's last 'y', got 2.5e7"], None),
        (["download it (wget https://a.b/c) and", "download it (wget http://x.org/y z) and"], 2),
        (["`expected` is empty", "`text` is empty"], 2),
    ],
)
def test_texts_are_alike_if_only_names_and_numbers_differ(texts, last):
    """All are folded with the first, or (last) the last one is not."""
    full, rests = fold(*(Problem(LINE, text) for text in [texts[0]] * 3 + texts[1:]))
    assert len(full) == 3 + (last is not None)
    assert bool(rests) == (last is None)


@pytest.mark.parametrize(
    "names",
    [
        [f"{k}.png" for k in range(400)],
        [f"{a}{b}{c}.png" for a, b, c in itertools.product("abcdefgh", repeat=3)][:400],
        [f"My page {'x' * k} does not exist.png" for k in range(1, 401)],
        [f"{'e' * k}" for k in range(1, 401)],
        [f"Größe '{a}{b} of \x1b[31m" for a, b in itertools.product("abcdefghijklmnopqrstu", repeat=2)][:400],
        [f"{'long ' * 100}{k}.png" for k in range(400)],
    ],
)
@pytest.mark.parametrize("kind", [IMAGE, SMALL])
def test_images_of_any_name_are_alike(names, kind):
    full, rests = fold(*(missing(name)._replace(kind=kind) for name in names))
    assert full == [1, 2, 3]
    assert [rest.rpartition(" … ")[2] for rest in rests] == ["and 397 more like it: lines 4-400"]


def test_lines_are_named_as_spans_and_not_all_of_them():
    lines = [1, 2, 5, 12, 15, 16, 17, 33]
    assert fold(*map(missing, "abcdefgh"), lines=lines)[1] == [
        "a.jsonl:5: image data/c does not exist … and 5 more like it: lines 12, 15-17, 33"
    ]
    assert fold(*map(missing, "abcd"), lines=[1, 1, 1, 7])[1] == [
        "a.jsonl:1: image data/c does not exist … and 1 more like it: line 7"
    ]
    _, (rest,) = fold(*map(missing, "ab" * 20), lines=range(0, 80, 2))
    assert rest.endswith("and 37 more like it: lines 6, 8, 10, 12, 14, 16, 18, 20, 22, 24 …")


def test_files_and_kinds_are_folded_apart():
    folds = Folds()
    for file, kind in itertools.product("ab", (IMAGE, SMALL)):
        for line in range(1, 6):
            folds.add(Place(file, line), missing("x")._replace(kind=kind))
    assert [str(place) for place, _ in folds.rests()] == ["a:3", "a:3", "b:3", "b:3"]
    assert {kind: len(found) for kind, found in folds.of_kind.items()} == {IMAGE: 2, SMALL: 2}


def test_too_many_texts_of_one_kind_share_a_fold():
    words = ["".join(word) for word in itertools.product("abcdefghij", repeat=3)]
    full, rests = fold(*(Problem(RECORD, f"{word} is wrong") for word in words))
    assert full == [1, 2, 3, 4, 5, 6, 7, 8]  # five texts of their own, then three of other ones
    assert rests == ["a.jsonl:8: aah is wrong … and 992 more of other texts: lines 9-1000"]


def test_what_is_kept_and_printed_of_100_000_bad_rows_is_little():
    rng, folds, printed = random.Random(0), Folds(), 0
    for line in range(1, 100_001):
        word = "".join(rng.choices("abcdefghij ", k=9))
        kind = rng.choice([LINE, RECORD, IMAGE, SMALL, MIXED])
        text = rng.choice([f"image {word} does not exist", f"got {line}", f"{word} is {word}", f"'{word}' is no JSON"])
        printed += folds.add(Place("a.jsonl", line), Problem(kind, text, word))
    found = [fold for folds_of_kind in folds.of_kind.values() for fold in folds_of_kind]
    assert len(found) == 5 * 6
    assert printed == sum(len(fold.first) for fold in found) <= 90
    assert all(len(fold.spans) <= 11 for fold in found)
    assert sum(len(fold.first) + fold.more for fold in found) == 100_000


def test_the_step_folds_and_prints_all_if_asked(run_cli, tmp_path):
    words = [f"{a} {b}" for a, b in itertools.product("abcdefghijklmnopqrst", repeat=2)]
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": f"{word}.png"}]}], "expected": "x"}
        for word in words
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\x1b[2J\n" * 3)
    counts = (
        "403 rows, 0 images\n403 fatal problems in 403 of 403 rows, 0 warnings\n"
        "  fatal         400  images that cannot be used\n  fatal           3  lines that are no JSON object\n"
    )
    code, out, _ = run_cli("validate_data", path)
    lines = [f"{path}:{k}: image {tmp_path}/{word}.png does not exist\n" for k, word in enumerate(words, 1)]
    broken = [
        f"{path}:{k}: not JSON: Expecting property name enclosed in double quotes at column 2\n"
        for k in (401, 402, 403)
    ]
    text = f"image {tmp_path}/a c.png does not exist"[:120]
    assert code == 1
    assert out == "".join([*lines[:3], *broken, f"{path}:3: {text} … and 397 more like it: lines 4-400\n", counts])
    assert run_cli("validate_data", path, "--all")[:2] == (1, "".join([*lines, *broken]) + counts)
    # The page has the same.
    page = tmp_path / "report.html"
    assert run_cli("validate_data", path, "--report", page)[0] == 1
    html = page.read_text()
    assert html.count(".png does not exist") == 3
    assert '<li class="note">… and 397 more like it: lines 4-400</li>' in html
