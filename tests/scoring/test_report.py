"""The report: what is on the page, that records cannot break out of it, that it needs nothing else."""

import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from mistral_ft.html import percent
from mistral_ft.scoring.report import sides
from tests.conftest import ROOT, row, write_jsonl


class Page(HTMLParser):
    """A page's elements and its text, section by section."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.sections, self._section = set(), set(), {"": ""}, ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "section":
            self._section = dict(attributes)["id"]
            self.sections[self._section] = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th", "dt"):
            self.sections[self._section] += " "

    def handle_data(self, data):
        self.sections[self._section] += data

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())


def sure(p: float) -> dict:
    return {"confidence": {"sum": math.log(p), "mean": math.log(p), "min": math.log(p), "tokens": 1}}


ROWS = [
    *(row(i, f"Decree {i}", [f"{i}.png"]) | {"actual": f"Decree {i}", "kind": "law"} | sure(0.9) for i in range(8)),
    row(8, "Decree 18", ["8.png"]) | {"actual": "Decree 78", "kind": "law"} | sure(0.5),
    row(9, "Salt") | {"actual": "", "kind": "letter"} | sure(0.4),
    row(10, "Salt") | {"error": "image 10.png does not exist", "kind": "letter"},
    row(10, '{"number": "7"}') | {"actual": '{"number": "8"}', "kind": "letter"} | sure(0.8),
    row(12) | {"actual": "x"},
]


@pytest.fixture
def report(tmp_path, run_cli):
    def make(rows, *arguments, name="p.jsonl") -> str:
        path = write_jsonl(tmp_path / name, rows)
        code, out, err = run_cli("score", path, "--report", tmp_path / "r.html", *arguments)
        assert code == 0, err
        assert out.endswith(f"Report in {tmp_path / 'r.html'}\n")
        return (tmp_path / "r.html").read_text(encoding="utf-8")

    return make


def test_everything_is_on_the_page(report, tmp_path):
    others = [r | {"actual": "Salt"} if r["id"] in (3, 9) else r for r in ROWS if r["id"] != 10]
    rows = [r for r in ROWS if r["id"] != 10]
    page = Page(report(ROWS, "--by", "kind", "--target", "0.9"))
    assert list(page.sections) == ["", "figures", "slices", "fields", "confidence", "wrong", "examples", "rows"]
    assert "66.7 % of the answers are exactly right 8 of 12. A test of this size" in page.text("")
    assert "95 % certainty the true share lies between 39.1 % and 86.2 %" in page.text("")
    assert "letter 0 3 0.0 % 0.0 % to 56.1 %" in page.text("slices")
    assert "number 0.0 % 0.0 % to 79.3 % 1 ×" in page.text("fields")
    assert "Review the least sure 27.3% (confidence below 0.9000), and the rest is 100.0% right" in page.text(
        "confidence"
    )
    assert "for want of a usable confidence: 1 of the rows" in page.text("confidence")
    assert "Replaced characters 1 → 7 1 ×" in page.text("wrong")
    assert "Line 9 · id 8 · nearly right · confidence 0.500 Title? 8.png expected Decree 18 answered Decree 78" in (
        page.text("examples")
    )
    assert "expected Salt answered no answer error image 10.png does not exist" in page.text("examples")
    assert "1 with an `error` count as wrong lines 11" in page.text("rows")
    assert "1 with an id that stands in the file before count like any other lines 12" in page.text("rows")
    page = Page(report(rows, "--compare", write_jsonl(tmp_path / "other.jsonl", others)))
    assert "It cannot be told which file is better, at 95 % certainty." in page.text("comparison")
    assert "8 were right before and 8 are right now: 1 fixed, 1 broken." in page.text("comparison")
    assert "Broken Line 10 · id 9 Title? expected Salt before Salt now (empty)" in page.text("comparison")
    assert "Fixed Line 4 · id 3 Title? 3.png expected Decree 3 before Salt now Decree 3" in page.text("comparison")


def test_a_page_of_nothing_but_right_answers(report):
    page = Page(report([{"expected": "a", "actual": "a"}]))
    assert list(page.sections) == ["", "figures"]
    assert "0 wrong there is nothing to mend" in page.text("")


def test_a_page_of_nothing_but_wrong_answers(report):
    rows = [row(i, "a") | {"actual": "b", "finish_reason": "length"} | sure(0.01 + i / 10_000) for i in range(24)]
    page = Page(report(rows, "--by", "id"))
    assert "0.0 % of the answers are exactly right" in page.text("")
    assert "No part of the answers is 99.0% right without review." in page.text("confidence")
    assert "24 cut off at the length limit" in page.text("wrong")


def test_plots_are_vectors_in_the_colours_of_the_page(report):
    plots = re.findall("<svg.*?</svg>", report(ROWS, "--by", "kind"), re.DOTALL)
    assert len(plots) == 3
    for plot in plots:
        ElementTree.fromstring(plot)
        assert not re.search("#0[1-5]0[1-5]0[1-5]|<image|<style|font-family", plot)
    assert [re.search('aria-label="([^"]*)"', plot)[1].split(":")[0] for plot in plots] == [
        "Accuracy by slice",
        "Reliability",
        "Risk-coverage curve",
    ]
    assert ">letter</text>" in plots[0]


ATTACK = "\"'></svg></code><script>alert(1)</script><img src=x onerror=alert(1)>$x^2${{ 7 * 7 }}"


def test_no_text_of_a_record_becomes_part_of_the_page(report, tmp_path):
    def attacked(i, actual):
        record = row(i, f"{ATTACK} {i}", [f"{ATTACK}.png"], text=ATTACK) | {
            "actual": actual,
            "kind": f"{ATTACK} {i % 2}",
        }
        return record | {"id": f"{ATTACK}{i}", ATTACK: "a", "finish_reason": ATTACK} | sure(0.5 + i / 100)

    rows = [attacked(i, f"{ATTACK} {i}" if i % 3 else ATTACK[::-1]) for i in range(12)]
    rows.append(row(20, json.dumps({ATTACK: ATTACK})) | {"actual": json.dumps({ATTACK: "a"}), "kind": ATTACK})
    rows.append(row(21, "a") | {"error": ATTACK})
    rows.append(row(22, "a") | {"error": {"reason": ATTACK}})
    others = [r | {"actual": r["expected"]} if i % 2 else r | {"actual": ATTACK} for i, r in enumerate(rows)]
    names = [f"{text.replace('/', '')}.jsonl" for text in (ATTACK, f"other {ATTACK}", f"third {ATTACK}")]
    other = write_jsonl(tmp_path / names[1], others)
    third = write_jsonl(tmp_path / names[2], [r | {"id": f"other {r['id']}"} for r in rows])
    html = report(rows, "--by", "kind", "--compare", other, "--calibrate_on", third, name=names[0])
    html += report(rows[:12], "--by", ATTACK, name=names[0])
    page = Page(html)
    assert page.tags <= set(
        "html head meta title style body header h1 h2 h3 p div b nav a section table tr th td span i figure figcaption "
        "code article dl dt dd mark svg defs g path use text clippath rect".split()
    )
    assert not {name for name in page.attributes if name.startswith("on") or name == "src"}
    assert html.count("&lt;script&gt;alert(1)") > 50
    assert "{{ 7 * 7 }}" in page.text("examples")
    assert "&lt;/svg&gt;&lt;/code&gt;&lt;script&gt;" in re.search("<svg.*?</svg>", html, re.DOTALL)[0]


def test_the_page_needs_nothing_else(report):
    html = report(ROWS, "--by", "kind")
    policy = re.search('Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', html)
    assert links
    assert all((a or b).startswith("#") for a, b in links)


def test_invisible_characters_are_shown(report):
    html = report([{"expected": "abcdef\u202egh", "actual": "a\x00bcde\u200bfgh\x1b"}])
    assert not re.search("[\x00-\x08\x0b-\x1f\u200b\u202e]", html)
    page = Page(html).text("examples")
    assert r"expected abcdef\u202egh answered a\x00bcde\u200bfgh\x1b" in page


def test_the_same_input_gives_the_same_bytes(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", ROWS * 20)
    pages = []
    for seed in "12":
        target = tmp_path / f"{seed}.html"
        subprocess.run(
            [sys.executable, "-m", "score", path, "--by", "kind", "--report", target],
            cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True,
        )  # fmt: skip
        pages.append(target.read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("expected", "actual", "ours", "theirs"),
    [
        (
            "Decree 12",
            "Decree 17",
            [("same", "Decree 1"), ("only", "2")],
            [("same", "Decree 1"), ("only", "7")],
        ),
        ("the salt", "on salt", [("only", "the"), ("same", " salt")], [("only", "on"), ("same", " salt")]),
        ("a  b", "a b", [("same", "a "), ("only", "␣"), ("same", "b")], [("same", "a b")]),
        ("a\nb", "a b", [("same", "a"), ("only", "⏎"), ("same", "b")], [("same", "a"), ("only", "␣"), ("same", "b")]),
        ("abc", "xyz", [("only", "abc")], [("only", "xyz")]),
    ],
)
def test_differences_of_hand_aligned_answers(expected, actual, ours, theirs):
    def joined(pieces):  # neighbours of one kind
        text = [pieces[0]]
        for kind, piece in pieces[1:]:
            if kind == text[-1][0]:
                text[-1] = (kind, text[-1][1] + piece)
            else:
                text.append((kind, piece))
        return text

    assert tuple(map(joined, sides(expected, actual))) == (ours, theirs)


def test_long_answers_are_shortened():
    ours, theirs = sides("x" * 900 + "1", "x" * 900 + "2")
    assert ours == [("same", "x" * 80), ("cut", "740 more characters"), ("same", "x" * 80), ("only", "1")]
    assert theirs[-1] == ("only", "2")
    ours, _ = sides("ab" * 2500, "ac" * 2500)
    assert ours[-1] == ("cut", "3,799 more characters")


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.5, "50.0 %"), (1.0, "100.0 %"), (0.99999, "> 99.9 %"), (0.0, "0.0 %"), (1e-9, "< 0.1 %"), (2.5, "250.0 %"),
        (None, "–"),
    ],
)  # fmt: skip
def test_a_share_is_never_rounded_to_all_or_nothing(share, text):
    assert percent(share) == text.replace(" %", "\N{NO-BREAK SPACE}%")


def test_other_right_answers_stand_beside_the_nearest(report, tmp_path):
    rows = [row(0, ["12 May", "<b>\u202e", "12.05.", *map(str, range(11))]) | {"actual": "12.06."}]
    before = write_jsonl(tmp_path / "before.jsonl", [rows[0] | {"actual": "12 May"}])
    page = report(rows, "--compare", before)
    shown = Page(page).text("examples")
    assert "expected 12.05. or 12 May or <b>\\u202e or 0 or 1 " in shown
    assert "or 7 or … (3 more) answered 12.06." in shown
    assert "or 7 or … (3 more) before 12 May now 12.06." in Page(page).text("comparison")
    assert "<b>\\" not in page
