"""The report shows what is in the data: lengths, pages, answers, fields, rows; nothing of a record acts on the page."""

import json
import re
from html.parser import HTMLParser

import pytest

from mistral_ft.validation import contents
from mistral_ft.validation.checker import Place, Source
from mistral_ft.validation.contents import Contents
from tests.conftest import TINY, make_page, row, write_jsonl


def look_at(path) -> Contents:
    return Contents([Source(path, path.parent, False)])


class Page(HTMLParser):
    """A page's tags, its text by section, and the rows of its tables."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts, self.section, self.rows, self.in_cell = [], {}, "", [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        self.texts[self.section] = self.texts.get(self.section, "") + data
        if self.in_cell:
            self.rows[-1][-1] += data


@pytest.fixture
def make_report(run_cli, tmp_path):
    """make_report(path, …) -> the page."""

    def make(path, *arguments, code=0) -> Page:
        target = tmp_path / "report.html"
        assert run_cli("validate_data", path, "--report", target, *arguments)[0] == code
        return Page(target.read_text(encoding="utf-8"))

    return make


def titles(page: Page) -> list[str]:
    return [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]


def test_plots_are_of_characters_and_with_a_model_of_tokens_too(make_report, pages):
    of_pages = ["Pages per row: pages against rows", "Page sizes: width against height"]
    characters = ["Questions: characters against rows", "Answers: characters against rows"]
    page = make_report(pages / "train.jsonl")
    assert titles(page) == characters + of_pages
    page = make_report(pages / "train.jsonl", "--model_id", TINY)
    assert titles(page) == [
        *characters,
        "Prompt, without images: tokens against rows",
        "Images: tokens against rows",
        "Answer: tokens against rows",
        *of_pages,
    ]
    assert titles(make_report(write_jsonl(pages / "text.jsonl", [{"text": "A"}]))) == characters


def test_a_file_without_a_good_row_has_a_page_too(make_report, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n")
    page = make_report(tmp_path / "bad.jsonl", code=1)
    assert titles(page) == []
    assert page.texts.keys() == {"", "problems", "summary"}


def test_frequent_answers_and_fields_with_how_often_they_are_filled(make_report, tmp_path):
    answers = [
        {"a": 1, "a.b": "", "lines": [{"x": None}, {"x": "y"}], "": 0},
        {"a": None, "a.b": " ", "lines": []},
        {"a": False, "a.b": [], "lines": [{"x": ""}]},
        {"a": {"b": 5}, "c[]": {}},
    ]
    texts = [*map(json.dumps, answers), "yes", " yes ", "yes", "", "{broken"]
    page = make_report(write_jsonl(tmp_path / "a.jsonl", [row(k, text) for k, text in enumerate(texts)]))
    assert "9 answers, 7 different ones. 44.4\xa0% of them are JSON: 4." in page.texts["answers"]
    assert ["3", "33.3\xa0%", "", "yes"] in page.rows
    assert [cells[:4] for cells in page.rows[page.rows.index(["field", "there", "filled", "of all", ""]) + 1 :]] == [
        ["a", "3", "2", "50.0\xa0%"],
        ['"a.b"', "3", "0", "0.0\xa0%"],
        ["lines[].x", "2", "1", "25.0\xa0%"],
        ['""', "1", "1", "25.0\xa0%"],
        ["lines", "1", "0", "0.0\xa0%"],
        ["a.b", "1", "1", "25.0\xa0%"],
        ['"c[]"', "1", "0", "0.0\xa0%"],
    ]


def test_what_is_counted_is_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(contents, "MOST_COUNTED", 2)
    rows = [row(k, json.dumps({f"f{k}": k})) for k in range(5)] + [row(9, "(other fields)")]
    found = look_at(write_jsonl(tmp_path / "a.jsonl", rows))
    assert found.answers[contents.OTHER_ANSWERS] == 4
    assert found.fields == [("(other fields)", 3, 3), ("f0", 1, 1), ("f1", 1, 1)]


def test_long_answers_with_one_beginning_are_not_the_same(tmp_path):
    rows = [row(0, "x" * 300), row(1, "x" * 301), row(2, "x" * 300)]
    assert sorted(look_at(write_jsonl(tmp_path / "a.jsonl", rows)).answers.values()) == [1, 2]


def test_rows_that_are_shown(tmp_path):
    rows = [row(k, "x" * (40 * k % 97)) for k in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    found = look_at(path).samples()
    lengths = [len(record["expected"]) for record in rows]
    assert list(found.values()) == ["the first row", "of median length", "the longest row", *["drawn by lot"] * 4]
    first, median, longest, *_ = (place.line - 1 for place in found)
    assert first == 0
    assert lengths[median] == sorted(lengths)[20]
    assert lengths[longest] == max(lengths)
    assert look_at(path).samples() == found
    few = write_jsonl(tmp_path / "b.jsonl", rows[:2])
    assert look_at(few).samples() == {Place(str(few), 1): "the first row", Place(str(few), 2): "of median length"}


def test_rows_are_shown_with_their_pages(make_report, tmp_path):
    for number in range(5):
        make_page(tmp_path / f"{number}.png", number)
    images = [f"{number}.png" for number in (0, 1, 2, 3, 4)]
    page = make_report(write_jsonl(tmp_path / "a.jsonl", [row(0, "line 1\nline 2", images, "Who?\nWhere?")]))
    text = page.texts["samples"]
    assert "a.jsonl:1 · the first row" in text
    assert "line 1\nline 2" in text
    assert "Who?\nWhere?" in text
    assert re.findall(r"\d\.png", text) == ["0.png", "1.png", "2.png"]
    assert "Pages not shown: 2" in text
    assert all(a["src"].startswith("data:image/jpeg;base64,") for tag, a in page.tags if tag == "img")


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</dd></style></title><svg onload=alert(1)>",
    "{{ 7 * 7 }} {% raw %} ${x} $x^2$",
    "\x1b[31m red \x07\0\x08",
    "left \u202eright\u2066 \u2028 \u2029 \u200b",
    "\r\n lone \r cr",
    "W" * 50_000,
    '{"\\ud800": "\\udfff", "a\\u0000b": NaN}',
    '{"\\ud800": "\\udfff", "<b>": "\\u001b[2J", "\\u202e": 1' + "0" * 4000 + "}",
    "[" * 10_000 + "]" * 10_000,
]


def test_nothing_of_a_record_acts_on_the_page(make_report, tmp_path):
    rows = [row(k, text, text=text) for k, text in enumerate(HOSTILE)]
    rows += [row(k, "A", [text[:80]]) for k, text in enumerate(HOSTILE)] + [row(text, text) for text in HOSTILE]
    path = tmp_path / "<script>.jsonl"
    write_jsonl(path, rows * 2)
    page = make_report(path, "--model_id", TINY, code=1)
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "b", "object", "link", "base", "form"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert {a["src"][:5] for tag, a in page.tags if tag == "img"} <= {"data:"}
    assert not [c for c in raw if not c.isprintable() and c not in "\n\xa0"]
    assert "49" not in page.texts["samples"]


def test_the_terminal_shows_nothing_of_a_record_that_acts(run_cli, tmp_path):
    rows = [row(k, text, text=text) for k, text in enumerate(HOSTILE)] + [row(0, "A", [text]) for text in HOSTILE]
    rows += [{"messages": [{"role": text, "content": text}], "expected": "A"} for text in HOSTILE]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    code, out, err = run_cli("validate_data", path, "--model_id", TINY, "--show", 30, "--all")
    assert code == 1
    assert "Traceback" not in err
    assert not [line for line in out.splitlines() if not line.isprintable()]
    assert len(out.splitlines()) < 100
