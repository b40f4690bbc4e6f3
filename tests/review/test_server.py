"""The review server: what it answers, what it keeps, and what it refuses."""

import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from starlette.testclient import TestClient

from mistral_ft.data.pages import page_sizes
from mistral_ft.data.predictions import Predictions
from mistral_ft.data.records import read_records
from mistral_ft.errors import UserError
from mistral_ft.review import index as review_index
from mistral_ft.review import runs as review_runs
from mistral_ft.review.app import ReviewApp
from mistral_ft.review.desk import Desk
from mistral_ft.review.export import export
from mistral_ft.review.guard import Guard
from mistral_ft.review.index import RowIndex, index_part, line_starts
from mistral_ft.review.log import Outdated, Review, ReviewLog, log_path
from mistral_ft.review.page_files import find_page, render_page
from mistral_ft.review.tokens import TokenView
from mistral_ft.scoring.diff import diff
from mistral_ft.status import read_status
from tests.conftest import ROOT, TINY, make_page, read_rows, row, write_jsonl

ROWS = [
    row(0, "A", ["0.png"]) | {"actual": "A", "confidence": {"min": -0.1, "mean": -0.1, "sum": -0.1, "tokens": 1}},
    row(1, "Brown fox", ["1.png"]) | {"actual": "Brawn fox", "language": "fr", "meta": {"year": 1990}},
    row(2, "C") | {"actual": "", "language": "en"},
    row(3, "D") | {"error": "image gone"},
    row(4, "E"),
    row(5, "Straße") | {"actual": "Strasse", "confidence": {"min": -2, "mean": -1, "sum": -2, "tokens": 2}},
]
HOST = "http://127.0.0.1:8000"
# As predict writes it.
THOUGHT = {
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Think:"}, {"type": "thinking", "thinking": "Draft."},
                                       {"type": "text", "text": "Answer."}]},
        {"role": "user", "content": "Title?"},
    ],
    "expected": "A", "thinking": "Hm.", "actual": "A", "finish_reason": "stop",
}  # fmt: skip


@pytest.fixture
def serve(tmp_path):
    """serve(rows or path, …) -> a client of a server on them."""
    with contextlib.ExitStack() as stack:

        def start(rows=ROWS, other=None, model=None, host="127.0.0.1", token=None, images=None, runs=None):
            path = rows if isinstance(rows, Path) else write_jsonl(tmp_path / "p.jsonl", rows)
            log = ReviewLog(path)
            stack.callback(log.close)
            app = ReviewApp(Desk(path, log, other), images or path.parent, TokenView(model and str(model)), runs)
            client = TestClient(
                Guard(app.starlette(), host, 8000, token), base_url=HOST, raise_server_exceptions=False,
                follow_redirects=False,
            )  # fmt: skip
            stack.enter_context(client)
            wait_for(lambda: app.desk.ready)
            return client

        yield start


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ids(client, **query) -> list[str]:
    """The ids of the rows in a list."""
    data = client.get("/api/view", params=query).json()
    return [summary["id"] for summary in data["first"]]


def decide(client, number, **change):
    """Save a decision about a row as the page does."""
    shown = client.get("/api/row", params={"row": number}).json()
    body = {"row": number, "generation": shown["generation"], **shown["review"], **change}
    return client.post("/api/review", json=body, headers={"Origin": HOST})


class TestLists:
    def test_filters(self, serve, tmp_path):
        client = serve()
        assert ids(client) == ["0", "1", "2", "3", "4", "5"]
        # Wrong as score has it: an empty answer, an error and a missing answer too.
        assert ids(client, show="errors") == ["1", "2", "3", "4", "5"]
        assert ids(client, show="correct") == ["0"]
        assert ids(client, show="failed") == ["3"]
        assert ids(client, field="language", value="fr") == ["1"]
        assert ids(client, field="language", value="(none)") == ["0", "3", "4", "5"]
        assert ids(client, field="meta.year", value="1990") == ["1"]
        assert ids(client, field="mistake", value="empty") == ["2"]
        assert ids(client, field="nothing", value="x") == []
        assert client.get("/api/view", params={"show": "nonsense"}).status_code == 400

    def test_search_folds_and_finds_any_field(self, serve):
        client = serve()
        assert ids(client, text="BROWN  fox") == ["1"]
        assert ids(client, text="strasse") == ["5"]
        assert ids(client, text="image gone") == ["3"]
        assert ids(client, text="1990") == ["1"]
        assert ids(client, text="title?") == ["0", "1", "2", "3", "4", "5"]
        assert ids(client, text=".*") == []

    def test_orders_put_rows_without_the_value_last(self, serve):
        client = serve()
        assert ids(client, sort="confidence") == ["5", "0", "1", "2", "3", "4"]
        assert ids(client, sort="confidence", descending=1) == ["0", "5", "1", "2", "3", "4"]
        assert ids(client, sort="length", descending=1)[:2] == ["1", "5"]
        assert ids(client, sort="cer")[:3] == ["0", "1", "5"]
        assert ids(client, sort="file", descending=1)[0] == "5"

    def test_a_data_set_has_no_errors(self, serve):
        client = serve([row(0, "A"), row(1, "B")])
        assert client.get("/api/status").json()["predicted"] is False
        assert ids(client, show="errors") == []
        assert ids(client) == ["0", "1"]
        assert client.get("/api/row?row=0").json()["right"] is None

    def test_a_list_stays_while_its_rows_change(self, serve):
        client = serve()
        view = client.get("/api/view?show=errors").json()["view"]
        assert decide(client, 1, expected="Brawn fox", reviewed=True).status_code == 200
        rows = client.get("/api/rows", params={"view": view}).json()["rows"]
        assert [r["id"] for r in rows] == ["1", "2", "3", "4", "5"]
        assert rows[0]["right"] is True
        assert ids(client, show="errors") == ["2", "3", "4", "5"]
        step = client.get("/api/step", params={"view": view, "from": 0}).json()
        assert step == {"place": 1}
        assert client.get("/api/step", params={"view": view, "from": 1, "backwards": 1}).json() == {"place": None}
        assert client.get("/api/place", params={"view": view, "row": 3}).json() == {"place": 2}
        assert client.get("/api/rows?view=999").status_code == 410

    def test_rows_are_found_by_id_and_line(self, serve):
        client = serve([row(0, "A") | {"id": "a b/ü"}, row(7, "B"), row(8, "C") | {"id": None}])
        assert client.get("/api/find", params={"id": "a b/ü"}).json() == {"row": 0}
        assert client.get("/api/find", params={"id": "7"}).json() == {"row": 1}
        assert client.get("/api/find", params={"line": "3"}).json() == {"row": 2}
        assert client.get("/api/find", params={"id": "none"}).json() == {"row": None}

    def test_fields_with_their_values(self, serve):
        fields = {field["name"]: field for field in serve().get("/api/fields").json()["fields"]}
        assert fields["language"]["values"] == [["(none)", 4], ["fr", 1], ["en", 1]]
        assert dict(fields["mistake"]["values"]) == {
            "near": 1, "form": 1, "empty": 1, "error": 1, "unanswered": 1, "(none)": 1,
        }  # fmt: skip

    def test_a_field_with_too_many_values_is_not_kept(self, monkeypatch, serve):
        monkeypatch.setattr(review_index, "MOST_SLICES", 5)
        client = serve([row(k, "A") | {"page": k, "kind": "x"} for k in range(9)])
        fields = {field["name"]: field["too_many"] for field in client.get("/api/fields").json()["fields"]}
        assert fields["page"] is True
        assert fields["kind"] is False
        assert ids(client, text="8") == ["8"]


class TestRecord:
    def test_everything_about_a_row(self, serve):
        shown = serve().get("/api/row?row=1").json()
        assert shown["diff"]["words"] == [["Brown", "Brawn"], [" fox", " fox"]]
        assert shown["diff"]["characters"] == [["Br", "Br"], ["o", "a"], ["wn", "wn"], [" fox", " fox"]]
        assert shown["messages"] == [{"role": "user", "blocks": [["text", "Title?"], ["image", "1.png"]]}]
        assert shown["metrics"]["cer"] == pytest.approx(1 / 9)
        assert shown["metrics"]["exact"] == 0
        assert shown["fields"] == [["language", "fr"], ["meta", '{"year": 1990}']]
        assert shown["right"] is False

    def test_thinking_stands_apart(self, serve):
        shown = serve([THOUGHT]).get("/api/row?row=0").json()
        assert shown["messages"] == [
            {"role": "system", "blocks": [["text", "Think:"], ["thinking", "Draft."], ["text", "Answer."]]},
            {"role": "user", "blocks": [["text", "Title?"]]},
        ]
        assert (shown["thinking"], shown["actual"], shown["expected"]) == ("Hm.", "A", "A")
        assert (shown["right"], shown["problem"], shown["fields"]) == (True, None, [["finish_reason", "stop"]])

    def test_json_answers_field_by_field(self, serve):
        wanted, got = {"name": "Salt", "price": 4.0, "tax": 1}, {"name": "Salt", "price": 5, "more": 2}
        sure = {"min": -1, "mean": -1, "sum": -1, "fields": {"price": {"min": -0.6931471805599453, "mean": 0}}}
        client = serve([row(0, json.dumps(wanted)) | {"actual": json.dumps(got), "confidence": sure}])
        assert client.get("/api/row?row=0").json()["json_fields"] == [
            ["name", '"Salt"', '"Salt"', True, None],
            ["price", "4", "5", False, pytest.approx(0.5)],
            ["tax", "1", None, False, None],
            ["more", None, "2", False, None],
        ]

    def test_malformed_records_are_shown_with_what_is_wrong(self, serve):
        rows = [
            {"messages": "none", "expected": {"a": 1}},
            {"messages": [1, {"role": 5, "content": [{"type": "image"}, "x", {"type": "video"}]}]},
            {},
            {"id": 12345678901234567890, "messages": [], "x": float("nan")},
        ]
        client = serve(rows)
        assert client.get("/api/status").json()["rows"] == 4
        shown = [client.get("/api/row", params={"row": k}) for k in range(4)]
        assert [answer.status_code for answer in shown] == [200] * 4
        assert shown[0].json()["problem"] == "`messages` must be a list of at least one message, got a string"
        assert shown[0].json()["editable"] is False
        assert shown[1].json()["messages"][1]["blocks"] == [
            ["image", ""],
            ["other", "x"],
            ["other", '{"type": "video"}'],
        ]
        assert shown[3].json()["id"] == "12345678901234567890"
        assert shown[3].json()["fields"] == [["x", "NaN"]]

    def test_tokens_are_those_of_the_encoder(self, serve, pages):
        client = serve(pages / "train.jsonl", model=TINY)
        shown = client.get("/api/token_view?row=0").json()
        image = next(part for part in shown["stretches"] if part["kind"] == "image")
        assert (image["grid"], image["size"], image["fed"]) == ([4, 2], [56, 112], [56, 112])
        assert shown["image"] == 12
        learned = [text for part in shown["stretches"] if part["learned"] for text in part["texts"]]
        assert "".join(learned) == "Decree 20 on Salt</s>"
        two = client.get("/api/token_view?row=5").json()
        assert [part["grid"] for part in two["stretches"] if part["kind"] == "image"] == [[2, 3], [2, 3]]

    def test_a_model_that_reads_text_only_has_no_tokens_for_pages(self, serve, pages, tmp_path):
        (tmp_path / "text").mkdir()
        shutil.copy(TINY / "tokenizer.json", tmp_path / "text")
        (tmp_path / "text/config.json").write_text("{}")
        client = serve(pages / "train.jsonl", model=tmp_path / "text")
        answer = client.get("/api/token_view?row=0")
        reason = "shows an image, but the model reads text only; leave it out, or take a model with a vision tower"
        assert (answer.status_code, answer.json()) == (422, {"error": reason})

    def test_without_a_model_there_is_no_token_view(self, serve):
        answer = serve().get("/api/token_view?row=0")
        assert answer.status_code == 422
        assert "--model" in answer.json()["error"]


class TestDiff:
    def test_both_sides_are_kept(self):
        a, b = "one two\n three", "one 2\n  three four"
        for by in ("words", "characters"):
            pieces = diff(a, b, by)
            assert "".join(x for x, _ in pieces) == a
            assert "".join(y for _, y in pieces) == b

    def test_long_answers(self):
        rng = np.random.default_rng(0)
        a, b = (" ".join(map(str, rng.integers(0, 99, 30_000))) for _ in range(2))
        pieces = diff(a, b, "characters")
        assert "".join(x for x, _ in pieces) == a
        assert sum(len(y) for x, y in pieces if x == y) > 0.3 * len(b)


class TestReviews:
    def test_decisions_last_and_the_file_is_not_touched(self, serve, tmp_path):
        client = serve()
        before = (tmp_path / "p.jsonl").read_bytes()
        assert decide(client, 2, expected="Corrected\n„ü“", reviewed=True).json()["row"]["right"] is False
        assert decide(client, 5, expected="Strasse", reviewed=True).json()["row"]["right"] is True
        assert decide(client, 0, flagged=True).json()["row"]["flagged"] is True
        assert (tmp_path / "p.jsonl").read_bytes() == before
        status = client.get("/api/status").json()
        assert (status["reviewed"], status["edited"], status["flagged"]) == (2, 2, 1)
        assert ids(client, text="corrected") == ["2"]
        lines = read_rows(tmp_path / "p.jsonl.review.jsonl")
        assert [(line["line"], line["id"], line["version"]) for line in lines] == [(3, 2, 1), (6, 5, 1), (1, 0, 1)]
        assert lines[0]["expected"] == "Corrected\n„ü“"

    def test_undo_is_one_more_decision(self, serve, tmp_path):
        client = serve()
        decide(client, 2, expected="quince", reviewed=True)
        assert ids(client, text="quince") == ["2"]
        shown = decide(client, 2, expected=None, reviewed=False).json()["row"]
        assert (shown["expected"], shown["edited"], shown["reviewed"]) == ("C", False, False)
        assert len(read_rows(tmp_path / "p.jsonl.review.jsonl")) == 2
        assert ids(client, text="quince") == []

    def test_two_tabs_do_not_overwrite_each_other(self, serve):
        client = serve()
        stale = client.get("/api/row?row=1").json()
        assert decide(client, 1, expected="first tab", reviewed=True).status_code == 200
        body = {"row": 1, "generation": 1, **stale["review"], "expected": "second tab"}
        answer = client.post("/api/review", json=body, headers={"Origin": HOST})
        assert answer.status_code == 409
        assert answer.json()["row"]["expected"] == "first tab"
        assert client.get("/api/row?row=1").json()["expected"] == "first tab"

    def test_a_correction_back_to_the_file_is_none(self, serve):
        client = serve()
        decide(client, 1, expected="x")
        assert decide(client, 1, expected="Brown fox").json()["row"]["edited"] is False

    @pytest.mark.parametrize(
        ("change", "status"),
        [({"expected": 5}, 400), ({"expected": "\ud800"}, 400), ({"row": 99}, 404), ({"row": True}, 400),
         ({"reviewed": "yes"}, 400), ({"generation": 7}, 409), ({"version": "0"}, 400)],
    )  # fmt: skip
    def test_what_is_no_decision(self, serve, tmp_path, change, status):
        client = serve()
        body = {"row": 1, "generation": 1, "version": 0, "expected": "x", "reviewed": True, "flagged": False} | change
        answer = client.post(
            "/api/review", content=json.dumps(body), headers={"Origin": HOST, "Content-Type": "application/json"}
        )
        assert answer.status_code == status
        assert (tmp_path / "p.jsonl.review.jsonl").read_bytes() == b""

    def test_equal_rows_have_reviews_of_their_own(self, serve, tmp_path):
        twin = {"messages": [{"role": "user", "content": "?"}], "expected": "A", "actual": "B"}
        client = serve([twin, twin, twin])
        decide(client, 1, expected="second")
        shown = [client.get("/api/row", params={"row": k}).json()["expected"] for k in range(3)]
        assert shown == ["A", "second", "A"]
        assert export(tmp_path / "p.jsonl", tmp_path / "out.jsonl").edited == 1
        assert [r["expected"] for r in read_rows(tmp_path / "out.jsonl")] == ["A", "second", "A"]

    def test_half_a_line_at_the_logs_end_is_removed(self, tmp_path, capsys):
        path = tmp_path / "p.jsonl"
        log = ReviewLog(path)
        log.save("ab", {"line": 1}, Review(expected="x"))
        log.close()
        whole = log_path(path).read_bytes()
        log_path(path).write_bytes(whole + b'{"time": "2026-01-01T00:00:00Z", "row": "cd", "vers')
        log = ReviewLog(path)
        assert capsys.readouterr().err == f"{log_path(path)}: removed half a line at its end\n"
        assert log_path(path).read_bytes() == whole
        assert log.reviews == {"ab": Review(1, "x")}
        assert log.save("cd", {}, Review(flagged=True)).version == 1
        with pytest.raises(Outdated):
            log.save("cd", {}, Review())
        log.close()

    def test_a_log_that_is_none_is_left_alone(self, tmp_path):
        log_path(tmp_path / "p.jsonl").write_text('{"row": 1}\n')
        with pytest.raises(UserError, match=r"p.jsonl.review.jsonl:1: is no line of a review"):
            ReviewLog(tmp_path / "p.jsonl")
        assert log_path(tmp_path / "p.jsonl").read_text() == '{"row": 1}\n'

    def test_one_server_writes_at_a_time(self, tmp_path):
        log = ReviewLog(tmp_path / "p.jsonl")
        with pytest.raises(UserError, match="another server is writing reviews of this file"):
            ReviewLog(tmp_path / "p.jsonl")
        log.close()
        assert not log_path(tmp_path / "p.jsonl").exists()  # nothing was decided

    def test_a_full_disk_loses_nothing_and_says_so(self, serve, tmp_path, monkeypatch):
        client = serve()
        decide(client, 1, expected="kept")
        before = log_path(tmp_path / "p.jsonl").read_bytes()
        write = os.write

        def full(handle, data):
            if len(data) > 20:
                return write(handle, data[:20])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        answer = decide(client, 2, expected="lost?")
        monkeypatch.undo()
        assert (answer.status_code, answer.json()) == (507, {"error": "not saved: No space left on device"})
        assert log_path(tmp_path / "p.jsonl").read_bytes() == before
        assert client.get("/api/row?row=2").json()["expected"] == "C"


class TestExport:
    def test_a_corrected_data_set_that_train_takes(self, serve, tmp_path):
        client = serve([*ROWS, row(9) | {"actual": "no expected"}])
        decide(client, 1, expected="Brawn fox", reviewed=True)
        for number in (0, 1):
            make_page(tmp_path / f"{number}.png", number)
        done = client.post("/api/export", json={}, headers={"Origin": HOST}).json()
        assert done["path"] == str(tmp_path / "p.corrected.jsonl")
        assert (done["count"], done["edited"], done["reviewed"]) == (6, 1, 1)
        assert done["left_out"] == ["7: no `expected`: the answer to learn and to score against"]
        records = read_records([done["path"]], expected_required=True)
        assert [record.expected for record in records] == ["A", "Brawn fox", "C", "D", "E", "Straße"]
        assert set(records[1].data) == {"id", "messages", "expected", "language", "meta"}

    def test_a_row_that_is_not_corrected_keeps_calls_and_thinking(self, serve, tmp_path):
        answer = {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "A"}],
        }
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
        rows = [
            {"id": k, "messages": [{"role": "user", "content": "Q"}, last]} for k, last in enumerate([answer, call])
        ]
        client = serve([*rows, rows[0] | {"id": 2}])
        decide(client, 2, expected="B", reviewed=True)
        client.post("/api/export", json={}, headers={"Origin": HOST})
        exported = read_rows(tmp_path / "p.corrected.jsonl")
        assert exported == [*rows, {"id": 2, "messages": rows[0]["messages"][:1], "expected": "B"}]

    def test_from_the_command_line(self, tmp_path, run_cli):
        path = write_jsonl(tmp_path / "p.jsonl", ROWS[:2])
        path.write_text(path.read_text() + '{"half": \n')
        log = ReviewLog(path)
        log.save(read_index(path).name_of(0), {}, Review(expected="AA", reviewed=True))
        log.close()
        code, out, err = run_cli("server", path, "--export", tmp_path / "out.jsonl")
        assert code == 0
        assert out.splitlines() == [
            f"2 records in {tmp_path / 'out.jsonl'}: 1 corrected, 1 reviewed, 0 flagged",
            f"python -m train --dataset {tmp_path / 'out.jsonl'} --images_dir {tmp_path}",
        ]
        assert (
            err == f"left out: {path}:3: the line ends in the middle of the record (column 8): is the file cut off?\n"
        )
        assert [r["expected"] for r in read_rows(tmp_path / "out.jsonl")] == ["AA", "Brown fox"]

    def test_never_over_the_source(self, tmp_path, run_cli):
        path = write_jsonl(tmp_path / "p.jsonl", ROWS)
        code, _, err = run_cli("server", path, "--export", path)
        assert code == 2
        assert err == f"error: {path}: is what is reviewed; export to another file\n"
        code, _, err = run_cli(
            "server", write_jsonl(tmp_path / "q.jsonl", [row(1)]), "--export", tmp_path / "out.jsonl"
        )
        assert code == 2
        assert "q.jsonl: holds no record that train would take, such as line 1: no `expected`" in err
        assert not (tmp_path / "out.jsonl").exists()


def read_index(path) -> RowIndex:
    """The index of a file, read to its end."""
    index = RowIndex(path)
    for start, stop in itertools.pairwise(line_starts(index.path, 0, index.size)):
        index.add(index_part(index.path, start, stop))
    return index


class TestIndex:
    def test_parts_make_the_same_index_as_the_whole(self, tmp_path, monkeypatch):
        rows = [row(k, "ä" * (k % 50)) | {"actual": "x", "tag": f"t{k % 7}"} for k in range(300)]
        path = write_jsonl(tmp_path / "p.jsonl", rows)
        path.write_text(path.read_text().replace('{"id": 17,', '{"id" 17,'))
        whole = read_index(path)
        monkeypatch.setattr(review_index, "CHUNK_BYTES", 1000)
        parts = read_index(path)
        assert len(line_starts(path, 0, parts.size)) > 10
        assert whole.rows.tobytes() == parts.rows.tobytes()
        assert [whole.bad, whole.lines] == [parts.bad, 300]
        assert whole.bad == [(18, "not JSON: Expecting ':' delimiter at column 7")]
        names = list(parts.columns["tag"].values)
        assert [names[code] for code in parts.columns["tag"].codes] == [r["tag"] for r in rows if r["id"] != 17]
        assert parts.search("ä" * 49).tolist() == whole.search("ä" * 49).tolist()
        assert parts.search("ä" * 49).sum() == 6

    def test_broken_lines_are_listed_and_the_others_shown(self, serve, tmp_path):
        path = tmp_path / "p.jsonl"
        good = json.dumps(ROWS[1])
        path.write_bytes(
            b"\xef\xbb\xbf" + good.encode() + b'\n\n{"a": 1,}\n[1]\n' + b"\xff\n" + b'{"a":' * 50000 + b"\n"
            + good.encode() + b'\n{"id": "half'
        )  # fmt: skip
        client = serve(path)
        assert ids(client) == ["1", "1"]
        data = client.get("/api/bad_lines").json()
        assert data["count"] == 5
        assert data["lines"] == [
            [3, "trailing comma at column 8: JSON allows none, remove it"],
            [4, "expected a JSON object, got a list"],
            [5, "not UTF-8 text: invalid start byte at byte 1"],
            [6, "nested too deeply to be read"],
            [8, "the line ends in the middle of the record (column 12): is the file cut off?"],
        ]
        assert client.get("/api/row?row=1").json()["line"] == 7

    def test_an_empty_file_is_no_mistake(self, serve, tmp_path):
        (tmp_path / "p.jsonl").write_text("")
        client = serve(tmp_path / "p.jsonl")
        assert client.get("/api/view").json()["total"] == 0

    def test_very_long_lines(self, serve, tmp_path, monkeypatch):
        monkeypatch.setattr(review_index, "LONGEST_LINE", 1_000_000)
        rows = [row(0, "A"), row(1, "x" * 300_000), row(2, "y" * 3_000_000), row(3, "B")]
        client = serve(rows)
        assert ids(client) == ["0", "1", "3"]
        assert client.get("/api/bad_lines").json()["lines"][0][0] == 3
        shown = client.get("/api/row?row=1").json()
        assert shown["expected"].endswith("x … (200,000 more characters)")
        assert shown["editable"] is False
        assert client.get("/api/row?row=2").json()["line"] == 4

    def test_deeply_nested_records_break_nothing(self, serve, tmp_path):
        path = tmp_path / "p.jsonl"
        lines = [json.dumps(ROWS[0])]
        lines += ['{"x": ' + '{"a":' * depth + "1" + "}" * depth + "}" for depth in range(50, 1000, 50)]
        path.write_text("\n".join(lines) + "\n")
        client = serve(path)
        status = client.get("/api/status").json()
        assert status["rows"] + status["bad_lines"] == 20
        for number in range(status["rows"]):
            assert client.get("/api/row", params={"row": number}).status_code in (200, 422)
        assert client.get("/api/view").status_code == 200


class TestGrowingFiles:
    def test_rows_appear_as_they_are_written(self, serve, tmp_path):
        path = write_jsonl(tmp_path / "p.jsonl", ROWS[:2])
        client = serve(path)
        line = json.dumps(ROWS[2])
        with open(path, "a") as file:
            file.write(line[:30])
            file.flush()
            time.sleep(1)
            assert client.get("/api/status").json()["rows"] == 2
            file.write(line[30:])  # whole, its line end still missing
            file.flush()
            wait_for(lambda: client.get("/api/status").json()["rows"] == 3)
            file.write("\n" + json.dumps(ROWS[3]) + "\n")
        wait_for(lambda: client.get("/api/status").json()["rows"] == 4)
        assert [client.get("/api/row", params={"row": k}).json()["line"] for k in range(4)] == [1, 2, 3, 4]
        assert client.get("/api/bad_lines").json()["count"] == 0

    def test_a_running_predict_is_followed_to_its_end(self, serve, tmp_path):
        rows = [row(k, "A") for k in range(4)]
        target = tmp_path / "run.jsonl"
        run = Predictions(target, {"model": "m"}, [[2, 0], [3, 1]])
        run.add({2: rows[2] | {"actual": "A"}, 0: rows[0] | {"actual": "B"}})
        client = serve(target)
        assert client.get("/api/status").json()["unfinished"] is True
        assert ids(client) == ["2", "0"]
        assert decide(client, 1, expected="B", reviewed=True).status_code == 200
        run.add({3: rows[3] | {"actual": "A"}, 1: rows[1] | {"actual": "A"}})
        wait_for(lambda: client.get("/api/status").json()["rows"] == 4)
        assert ids(client) == ["2", "0", "3", "1"]
        run.finish()
        wait_for(lambda: client.get("/api/status").json()["unfinished"] is False)
        wait_for(lambda: client.get("/api/status").json()["rows"] == 4)
        assert ids(client) == ["0", "1", "2", "3"]
        shown = client.get("/api/row?row=0").json()
        assert (shown["expected"], shown["reviewed"], shown["generation"]) == ("B", True, 2)

    def test_a_replaced_file_is_read_anew(self, serve, tmp_path):
        client = serve()
        write_jsonl(tmp_path / "new", [row(77, "Z")])
        os.replace(tmp_path / "new", tmp_path / "p.jsonl")
        wait_for(lambda: client.get("/api/status").json()["generation"] == 2)
        wait_for(lambda: client.get("/api/status").json()["rows"] == 1)
        assert ids(client) == ["77"]


OTHER = [row(1, "Brown fox", ["1.png"]) | {"actual": "Brown fox"}, ROWS[0] | {"actual": "wrong"}, ROWS[2]]


class TestComparison:
    def test_fixed_and_broken(self, serve, tmp_path):
        client = serve(other=write_jsonl(tmp_path / "o.jsonl", OTHER))
        assert ids(client, show="fixed") == ["0"]
        assert ids(client, show="broken") == ["1"]
        shown = client.get("/api/row?row=1").json()
        assert (shown["change"], shown["other"]["actual"], shown["other"]["right"]) == ("broken", "Brown fox", True)
        assert client.get("/api/row?row=3").json()["other"] is None
        # With the expected answer corrected, the other file's is held against that too.
        shown = decide(client, 1, expected="Brawn fox").json()["row"]
        assert (shown["change"], shown["right"], shown["other"]["right"]) == ("fixed", True, False)

    def test_a_correction_counts_after_a_restart_too(self, serve, tmp_path):
        path, other = write_jsonl(tmp_path / "p.jsonl", ROWS), write_jsonl(tmp_path / "o.jsonl", OTHER)
        log = ReviewLog(path)
        log.save(read_index(path).name_of(1), {}, Review(expected="Brawn fox"))
        log.close()
        client = serve(path, other=other)
        assert ids(client, show="fixed") == ["0", "1"]
        write_jsonl(tmp_path / "new", OTHER[1:])
        os.replace(tmp_path / "new", other)
        wait_for(lambda: ids(client, show="fixed") == ["0"])
        assert client.get("/api/row?row=1").json()["other"] is None

    def test_other_expected_answers(self, serve, tmp_path):
        other = [row(1, "Brawn fox", ["1.png"]) | {"actual": "Brawn fox"}]
        shown = serve(other=write_jsonl(tmp_path / "o.jsonl", other)).get("/api/row?row=1").json()
        assert (shown["other"]["right"], shown["other"]["expects_otherwise"]) == (False, True)


class TestScores:
    def test_the_numbers_are_those_of_score(self, serve, tmp_path, run_cli):
        client = serve(other=write_jsonl(tmp_path / "o.jsonl", OTHER))
        view = client.get("/api/view").json()["view"]
        ours = client.get("/api/scores", params={"view": view, "by": "language"}).json()
        _, out, _ = run_cli(
            "score", tmp_path / "p.jsonl", "--json", "--by", "language", "--compare", tmp_path / "o.jsonl"
        )
        theirs = json.loads(out)
        assert ours["accuracy"] == theirs["accuracy"] == 1 / 6
        for name in ("count", "hits", "accuracy_low", "accuracy_high", "normalised_accuracy", "cer", "wer", "anls",
                     "token_f1", "wrong", "slices", "confidence"):  # fmt: skip
            assert ours[name] == theirs[name], name
        assert ours["comparison"]["fixed"] == len(theirs["comparison"]["fixed"]) == 1
        assert ours["comparison"]["p_value"] == theirs["comparison"]["p_value"]
        assert ours["comparison"]["differences"] == theirs["comparison"]["differences"]

    def test_of_the_list_with_corrections(self, serve):
        client = serve()
        decide(client, 5, expected="Strasse")
        view = client.get("/api/view", params={"field": "language", "value": "(none)"}).json()["view"]
        scores = client.get("/api/scores", params={"view": view}).json()
        assert (scores["hits"], scores["count"], scores["corrected"]) == (2, 4, 1)

    def test_by_page_size(self, serve, tmp_path):
        make_page(tmp_path / "0.png", 0)
        client = serve()
        view = client.get("/api/view").json()["view"]
        slices = client.get("/api/scores", params={"view": view, "by": "page_size"}).json()["slices"]
        assert {name: part["count"] for name, part in slices.items()} == {
            "up to 0.5 megapixels": 1, "page cannot be opened": 1, "no page": 4,
        }  # fmt: skip

    def test_page_sizes_are_not_looked_up_outside_of_the_images_folder(self, serve, tmp_path):
        (tmp_path / "pages").mkdir()
        make_page(tmp_path / "secret.png", 0)
        client = serve([row(0, "A", ["../secret.png"]) | {"actual": "A"}], images=tmp_path / "pages")
        view = client.get("/api/view").json()["view"]
        slices = client.get("/api/scores", params={"view": view, "by": "page_size"}).json()["slices"]
        assert set(slices) == {"page cannot be opened"}

    def test_nothing_to_score(self, serve):
        client = serve([row(0, "A")])
        view = client.get("/api/view").json()["view"]
        assert client.get("/api/scores", params={"view": view}).status_code == 422


class TestPages:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "pages"
        (folder / "deep").mkdir(parents=True)
        make_page(folder / "deep/a.png", 5)
        return folder

    def get(self, serve, folder, name):
        client = serve([row(0, "A", [name])], images=folder)
        return client.get("/api/image?row=0&image=0&page=0")

    def test_a_page_as_it_is(self, serve, folder):
        answer = self.get(serve, folder, "deep/a.png")
        assert answer.content == (folder / "deep/a.png").read_bytes()
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-content-type-options"] == "nosniff"

    @pytest.mark.parametrize("mode", ["CMYK", "I;16", "F", "1", "RGBA", "LA", "P", "YCbCr"])
    def test_every_mode_becomes_something_a_browser_shows(self, folder, mode):
        suffix = {"CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "tif")
        image = Image.new("L", (40, 30), 200).convert(mode) if mode not in ("I;16", "F") else Image.new(mode, (40, 30))
        image.save(folder / f"x.{suffix}")
        data, kind = render_page(f"{folder}/x.{suffix}", 0)
        with Image.open(io.BytesIO(data)) as shown:
            assert (shown.size, shown.format) == ((40, 30), kind.removeprefix("image/").upper())
            assert shown.mode in ("RGB", "L")

    def test_pages_are_upright(self, folder):
        image = Image.new("RGB", (40, 20), "white")
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(folder / "turned.jpg", exif=exif)
        assert page_sizes(f"{folder}/turned.jpg", 9) == [(20, 40)]
        with Image.open(io.BytesIO(render_page(f"{folder}/turned.jpg", 0)[0])) as shown:
            assert shown.size == (20, 40)

    def test_other_rows_are_shown_as_records(self, serve, folder):
        ask, say = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
        client = serve([{"messages": [ask, say]}, {"prompt": "Q", "completion": "A"}, {"text": "T"}], images=folder)
        rows = [client.get(f"/api/row?row={number}").json() for number in range(3)]
        assert [row["expected"] for row in rows] == ["A", "A", None]
        assert rows[0]["messages"] == rows[1]["messages"] == [{"role": "user", "blocks": [["text", "Q"]]}]
        assert rows[2]["fields"] == [["text", "T"]]
        assert [row["problem"] for row in rows] == [None, None, None]

    def test_a_page_in_a_table(self, serve, folder, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        data = (folder / "deep/a.png").read_bytes()
        pyarrow.parquet.write_table(pyarrow.table({"image": [data]}), folder / "deep/a.parquet")
        answer = self.get(serve, folder, "deep/a.parquet#row=0&column=image")
        assert (answer.content, answer.headers["content-type"]) == (data, "image/png")

    def test_pages_of_a_tiff_and_a_pdf(self, serve, folder):
        sheets = [Image.new("L", (30 + 10 * k, 20), 50 * k) for k in range(3)]
        sheets[0].save(folder / "many.tif", save_all=True, append_images=sheets[1:])
        sheets[0].save(folder / "many.pdf", save_all=True, append_images=sheets[1:], resolution=200)
        client = serve([row(0, "A", ["many.tif", "many.pdf", "deep/a.png", "none.png"])], images=folder)
        found = client.get("/api/images?row=0").json()["images"]
        assert found[0] == {"name": "many.tif", "pages": [[30, 20], [40, 20], [50, 20]]}
        assert [page[0] for page in found[1]["pages"]] == [30, 40, 50]
        assert found[2]["pages"] == [[84, 56]]
        assert (
            found[3]["error"] == f"there is no such file in {folder}; start the server with -i and the images' folder"
        )
        for number in (0, 1):
            answer = client.get(f"/api/image?row=0&image={number}&page=2")
            with Image.open(io.BytesIO(answer.content)) as shown:
                assert shown.size == (50, 20)
        assert client.get("/api/image?row=0&image=0&page=3").status_code == 422
        assert client.get("/api/image?row=0&image=1&page=3").status_code == 422
        assert client.get("/api/image?row=0&image=9&page=0").status_code == 404

    def test_pages_that_references_name(self, serve, folder):
        sheets = [Image.new("L", (30 + 10 * k, 20), 50 * k) for k in range(3)]
        sheets[0].save(folder / "many.tif", save_all=True, append_images=sheets[1:])
        url = f"data:image/png;base64,{base64.b64encode((folder / 'deep/a.png').read_bytes()).decode()}"
        client = serve([row(0, "A", ["many.tif#page=2-3", url, "many.tif#page=4", "many.tif#page=x"])], images=folder)
        found = client.get("/api/images?row=0").json()["images"]
        assert found[:3] == [
            {"name": "many.tif#page=2", "pages": [[40, 20]]},
            {"name": "many.tif#page=3", "pages": [[50, 20]]},
            {"name": "embedded image", "pages": [[84, 56]]},
        ]
        assert "it has no page 4, the last is 3" in found[3]["error"]
        assert "`image` must name pages as" in found[4]["error"]
        with Image.open(io.BytesIO(client.get("/api/image?row=0&image=1&page=0").content)) as shown:
            assert shown.size == (50, 20)
            assert shown.convert("L").getpixel((5, 5)) == 100
        answer = client.get("/api/image?row=0&image=2&page=0")
        assert answer.content == (folder / "deep/a.png").read_bytes()
        assert answer.headers["content-type"] == "image/png"
        texts = [text for _, text in client.get("/api/row?row=0").json()["messages"][0]["blocks"]]
        assert texts == ["Title?", "many.tif#page=2-3", "embedded image", "many.tif#page=4", "many.tif#page=x"]

    def test_large_pages_are_scaled_down(self, folder, monkeypatch):
        monkeypatch.setattr("mistral_ft.review.page_files.MOST_PIXELS", 1000)
        data, _ = render_page(f"{folder}/deep/a.png", 0)
        with Image.open(io.BytesIO(data)) as shown:
            assert shown.width * shown.height <= 1000
            assert shown.size == (37, 25)

    def test_broken_and_oversized_pages_say_why(self, serve, folder, monkeypatch):
        whole = (folder / "deep/a.png").read_bytes()
        (folder / "half.png").write_bytes(whole[: len(whole) // 2])
        (folder / "text.png").write_text("<script>alert(1)</script>")
        (folder / "vector.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
        (folder / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
        os.mkfifo(folder / "pipe.png")
        Image.new("1", (1500, 1500)).save(folder / "large.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
        names = {
            "half.png": "image file is truncated",
            "text.png": "no image format that Pillow knows",
            "vector.svg": "no image format that Pillow knows",
            "broken.pdf": "the PDF is damaged",
            "pipe.png": "it is no file",
            "deep": "it is no file",
            "large.png": "has more than 2 million pixels; scale it down",
            "x" * 5000: "File name too long",
        }
        client = serve([row(0, "A", list(names))], images=folder)
        found = client.get("/api/images?row=0").json()["images"]
        for number, (name, reason) in enumerate(names.items()):
            answer = client.get(f"/api/image?row=0&image={number}&page=0")
            assert answer.status_code == 422
            assert answer.headers["content-type"] == "application/json"
            assert reason in answer.json()["error"], name
            if name != "half.png":  # whose header is whole
                assert reason in found[number]["error"]


SECRET = "the secret"
OUTSIDE = [
    "../secret.png", "/secret.png", "{folder}/../secret.png", "{folder}/a.png", "./../secret.png", "a/../../secret.png",
    "..\\secret.png", "a\\..\\..\\secret.png", "\\\\host\\share", "link.png", "linked/secret.png", "loop.png",
    "%2e%2e/secret.png", "..%2fsecret.png", "%2e%2e%2fsecret.png", "..%252fsecret.png", "..%c0%afsecret.png",
    "....//secret.png", "\u2025/secret.png", "．．/secret.png", "..\u2215secret.png", "a.png\0.jpg", "\0", "", ".",
    "..", "~/secret.png",
    "../secret.png#page=1", "link.png#page=1", "renamed.png", "/etc/passwd#page=1", "a.png#page=1/../../secret.png",
    "file:///etc/passwd", "http://127.0.0.1/x.png", "data:image/png;base64,AAAA", "/etc/passwd", "/proc/self/environ",
    "../secret.parquet#row=0&column=image", "linked/secret.parquet#row=0&column=image",
    "paths.parquet#row=0&column=image",
    "paths.parquet#row=1&column=image", "paths.parquet#row=2&column=image", "paths.parquet#row=0&column=image#page=1",
    "org/name:train#row=0&column=image", "a.png#row=0&column=image",
    "//etc/passwd", "C:\\secret.png", "a.png/../../secret.png", "..;/secret.png",
]  # fmt: skip


def write_status(folder: Path, seconds_ago: float = 0, **fields) -> Path:
    """A run's status file, by default of this process, which is alive."""
    folder.mkdir(parents=True, exist_ok=True)
    updated = datetime.now(timezone.utc) - timedelta(seconds=seconds_ago)
    status = {"pid": os.getpid(), "host": platform.node(), "updated": updated.isoformat(timespec="seconds")} | fields
    (folder / "status.json").write_text(json.dumps(status))
    return folder


class TestRuns:
    def shown(self, client) -> list[tuple[str, str]]:
        return [(run["name"], run["state"]) for run in client.get("/api/runs").json()["runs"]]

    def test_runs_at_work_come_first_and_old_ones_go(self, serve, tmp_path):
        runs = tmp_path / "runs"
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        write_status(runs / "busy", state="training", step=3, steps=9, loss=0.5, seconds_left=7, tokens_per_second=1)
        write_status(runs / "long", 9999, state="evaluating")  # its process lives
        write_status(runs / "killed", 60, state="training", pid=gone.pid)
        write_status(runs / "failed", 30, state="failed", error="no\ud800 memory")
        write_status(runs / "finished", 9999, state="done")
        write_status(runs / "elsewhere", 9999, state="training", host="elsewhere")  # nobody knows
        client = serve(runs=runs)
        assert client.get("/api/status").json()["runs"] is True
        expected = [("busy", "training"), ("long", "evaluating"), ("failed", "failed"), ("killed", "dead")]
        assert self.shown(client) == expected
        busy, long, failed, _ = client.get("/api/runs").json()["runs"]
        assert busy | {"age": 0} == {
            "name": "busy", "state": "training", "age": 0, "step": 3, "steps": 9, "loss": 0.5, "eval_loss": None,
            "seconds_left": 7, "error": None, "plot": False,
        }  # fmt: skip
        assert long["age"] >= 9999
        assert failed["error"] == "no? memory"
        shutil.rmtree(runs)
        assert self.shown(client) == []

    def test_a_real_run(self, serve, pages, train_tiny):
        run = train_tiny(pages / "train.jsonl", "--max_steps", 1)
        client = serve(runs=run.parent)
        assert self.shown(client) == [(run.name, "done")]
        plot = client.get("/api/plot", params={"run": run.name})
        assert plot.content == (run / "loss.svg").read_bytes()
        assert plot.headers["Content-Type"] == "image/svg+xml"
        assert plot.headers["Content-Disposition"] == "attachment"

    def test_without_a_folder_there_are_none(self, serve):
        client = serve()
        assert client.get("/api/status").json()["runs"] is False
        assert client.get("/api/runs").json() == {"runs": []}
        assert client.get("/api/plot?run=x").status_code == 404

    @pytest.mark.parametrize(
        "text",
        [
            "",
            '{"state": "training", "up',
            "[]",
            '{"state": "training"}',
            "\xff",
            "[" * 60000,
            '{"state": 3, "updated": 3}',
        ],
    )
    def test_broken_and_half_written_files_are_passed_over(self, serve, tmp_path, text):
        runs = tmp_path / "runs"
        write_status(runs / "good", state="training", loss="nan", step=True, steps=10**400, error=3)
        (write_status(runs / "bad") / "status.json").write_text(text, encoding="latin-1")
        client = serve(runs=runs)
        (good,) = client.get("/api/runs").json()["runs"]
        assert good["name"] == "good"
        assert [good[field] for field in ("loss", "step", "steps", "error")] == [None] * 4

    @pytest.mark.parametrize("updated", ["2026-01-01T00:00:00", "yesterday", "9999-12-31T23:59:59+00:00"])
    def test_times_that_are_none(self, serve, tmp_path, updated):
        write_status(tmp_path / "runs/a", state="done", updated=updated)
        assert self.shown(serve(runs=tmp_path / "runs")) == ([("a", "done")] if updated.startswith("9") else [])

    def test_numbers_that_are_no_process(self, tmp_path):
        for pid in (0, -1, 2**70, "1", None):
            assert read_status(write_status(tmp_path, state="training", pid=pid))["state"] == "dead"

    def test_only_files_of_the_folder_of_a_bearable_size(self, serve, tmp_path, monkeypatch):
        runs, outside = tmp_path / "runs", write_status(tmp_path / "outside", state="training")
        (outside / "loss.svg").write_text("<svg/>")
        runs.mkdir()
        (runs / "link").symlink_to(outside)
        (runs / "circle").symlink_to(runs / "circle")
        write_status(runs / "large", state="training", note="x" * 70_000)
        os.mkfifo(runs / "pipe")
        (runs / "pipes").mkdir()
        os.mkfifo(runs / "pipes/status.json")
        write_status(runs / "odd\nname", state="training")
        write_status(runs / "good", state="training")
        (runs / "good/loss.svg").symlink_to(outside / "loss.svg")
        client = serve(runs=runs)
        assert self.shown(client) == [("good", "training")]
        for name in ("good", "link", "../outside", str(outside), "", ".", "large"):
            answer = client.get("/api/plot", params={"run": name})
            assert (answer.status_code, answer.json()) == (422, {"error": "this run has no plot"})
        (runs / "good/loss.svg").unlink()
        (runs / "good/loss.svg").write_text("<svg/>")
        assert client.get("/api/plot?run=good").text == "<svg/>"
        monkeypatch.setitem(review_runs.MOST_BYTES, "loss.svg", 5)
        assert client.get("/api/plot?run=good").status_code == 422

    def test_of_many_the_newest_are_read(self, serve, tmp_path, monkeypatch):
        monkeypatch.setattr(review_runs, "MOST_READ", 2)
        for number in range(5):
            run = write_status(tmp_path / f"runs/{number}", state="training")
            os.utime(run / "status.json", (1e9 - number, 1e9 - number))
        assert sorted(self.shown(serve(runs=tmp_path / "runs"))) == [("0", "training"), ("1", "training")]

    def test_a_folder_that_is_not_there(self, tmp_path, run_cli):
        data = write_jsonl(tmp_path / "p.jsonl", ROWS)
        code, _, err = run_cli("server", data, "--runs_dir", tmp_path / "none")
        assert code == 2
        assert err == f"error: --runs_dir {tmp_path / 'none'}: no such folder; give the --output_dir of train\n"


class TestAttacks:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "pages"
        folder.mkdir()
        make_page(folder / "a.png", 1)
        image = Image.new("L", (9, 9))
        image.save(tmp_path / "secret.png")
        (tmp_path / "p.txt").write_text(SECRET)
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
        (folder / "linked").symlink_to(tmp_path)
        (folder / "link.png#page=1").write_bytes(
            (folder / "a.png").read_bytes()
        )  # read as a page of link.png, it would lead out
        (folder / "renamed.png").symlink_to(folder / "link.png#page=1")
        (folder / "loop.png").symlink_to(folder / "loop.png")
        paths = ["../secret.png", str(tmp_path / "secret.png"), "link.png"]
        pyarrow.parquet.write_table(pyarrow.table({"image": paths}), folder / "paths.parquet")
        secret = pyarrow.table({"image": [(tmp_path / "secret.png").read_bytes()]})
        pyarrow.parquet.write_table(secret, tmp_path / "secret.parquet")
        return folder

    @pytest.mark.parametrize("name", OUTSIDE)
    def test_nothing_outside_of_the_images_folder(self, serve, folder, name):
        name = name.replace("{folder}", str(folder))
        client = serve([row(0, "A", [name])], images=folder)
        answer = client.get("/api/image?row=0&image=0&page=0")
        assert answer.status_code == 422
        assert set(answer.json()) == {"error"}
        assert "error" in client.get("/api/images?row=0").json()["images"][0]

    def test_a_link_within_the_folder_is_followed(self, serve, folder):
        (folder / "inner.png").symlink_to(folder / "a.png")
        assert find_page(folder, "inner.png") == str((folder / "a.png").resolve())

    @pytest.mark.parametrize(
        "path",
        ["/ui/../server.py", "/ui/%2e%2e/server.py", "/ui/..%2fserver.py", "/ui/%2e%2e%2fserver.py", "/ui//etc/passwd",
         "/ui/..\\server.py", "/ui/%5c..%5cserver.py", "/ui/....//server.py", "/../p.txt", "/p.jsonl", "/p.txt",
         "/%2e%2e/%2e%2e/etc/passwd", "/ui/%00", "/api/../p.txt", "/dataset/test.jsonl", "/ui/"],
    )  # fmt: skip
    def test_only_the_pages_own_files(self, server, path):
        status, body = raw_get(server.port, path)
        assert status in (400, 404, 405), (status, body[:100])
        assert b"import" not in body
        assert b"messages" not in body

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "", "0.0.0.0",
         "192.168.1.5:8000", "[::1", "127.0.0.1@evil.example:8000", "evil.example#127.0.0.1"],
    )  # fmt: skip
    def test_foreign_hosts(self, serve, host):
        answer = serve().get("/api/row?row=0", headers={"Host": host})
        assert answer.status_code == 421
        assert "Brown" not in answer.text

    @pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "localhost:9999", "[::1]:8000"])
    def test_own_hosts(self, serve, host):
        assert serve().get("/api/status", headers={"Host": host}).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:8001"}, {},
         {"Origin": "http://127.0.0.1"}, {"Origin": HOST, "Sec-Fetch-Site": "cross-site"},
         {"Origin": HOST, "Sec-Fetch-Site": "same-site"}],
    )  # fmt: skip
    def test_forged_requests_change_nothing(self, serve, tmp_path, headers):
        client = serve()
        body = {"row": 1, "generation": 1, "version": 0, "expected": "forged", "reviewed": True, "flagged": False}
        assert client.post("/api/review", json=body, headers=headers).status_code == 403
        assert client.post("/api/export", json={}, headers=headers).status_code == 403
        assert log_path(tmp_path / "p.jsonl").read_bytes() == b""
        assert not (tmp_path / "p.corrected.jsonl").exists()

    def test_other_pages_read_nothing(self, serve):
        client = serve()
        for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            answer = client.get("/api/row?row=1", headers=headers)
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert client.get("/", headers=link).status_code == 200  # following a link to the page
        assert client.get("/api/row?row=1", headers=link).status_code == 403

    def test_forms_cannot_speak(self, serve):
        client = serve()
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            answer = client.post("/api/review", content="{}", headers={"Origin": HOST, "Content-Type": kind})
            assert answer.status_code == 415

    def test_odd_requests(self, serve):
        client = serve()
        for path in ("row?row=-1", "row?row=1e9", "row?row=99999999999999999999", "row", "view?count=x", "rows?view=-5",
                     "image?row=0&image=-3&page=x", "step?view=1&from=--5", "row?row=²"):  # fmt: skip
            assert client.get(f"/api/{path}").status_code in (400, 404, 410), path
        assert client.post("/api/review", content="[" * 100_000, headers=json_headers()).status_code == 400
        assert client.post("/api/review", content=b"\xff", headers=json_headers()).status_code == 400
        assert client.post("/api/review", content=b"x" * 5_000_000, headers=json_headers()).status_code == 413
        assert client.put("/api/review", headers={"Origin": HOST}).status_code == 405
        assert client.get("/api/status").status_code == 200

    def test_every_answer_carries_the_policy(self, serve):
        client = serve(token="t" * 16, host="0.0.0.0")
        for answer in (client.get("/"), client.get("/ui/app.js"), client.get("/api/status"), client.get("/nothing")):
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'; script-src 'self';" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cross-origin-resource-policy"] == "same-origin"

    def test_records_go_out_as_json_and_the_page_puts_them_in_as_text(self, serve):
        script = "<script>alert(1)</script><img src=x onerror=alert(1)>"
        answer = serve([row(0, script) | {"id": script, "actual": script}]).get("/api/row?row=0")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["expected"] == script
        for file in (ROOT / "ui").glob("*.js"):
            found = re.findall(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", file.read_text()
            )
            assert found == [], file
        page = (ROOT / "ui/index.html").read_text()
        assert re.findall(r"(?:src|href)=\"(?!/ui/)", page) == []
        assert "style=" not in page
        assert re.findall(r"<[^>]*\son\w+=", page) == []


def json_headers():
    return {"Origin": HOST, "Content-Type": "application/json"}


class TestToken:
    TOKEN = "a-token-of-22-letters."

    def test_another_host_demands_one(self, tmp_path, run_cli):
        code, _, err = run_cli("server", write_jsonl(tmp_path / "p.jsonl", ROWS), "--host", "0.0.0.0", "-p", 0)
        assert code == 2
        assert err == "error: --host 0.0.0.0: others could read and change the data; add --token to ask for one\n"
        code, _, err = run_cli("server", tmp_path / "p.jsonl", "--host", "0.0.0.0", "--token", "short")
        assert code == 2
        assert "give at least 16 characters" in err

    def test_without_it_nothing_is_shown(self, serve):
        client = serve(host="0.0.0.0", token=self.TOKEN)
        bad = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Cookie": "review-8000=wrong"},
               {"Cookie": f"review-8001={self.TOKEN}"}, {"Cookie": "\"'\\;=;=review-8000"}]  # fmt: skip
        for headers in bad:
            for path in ("/", "/api/row?row=1", "/ui/app.js", "/api/image?row=0&image=0&page=0"):
                answer = client.get(path, headers=headers)
                assert (answer.status_code, "Brown" in answer.text) == (401, False), (path, headers)
        assert client.get(f"/api/row?row=1&token={self.TOKEN}").status_code == 401  # not in the address of data
        assert client.post("/api/export", json={}, headers={"Origin": HOST}).status_code == 401

    def test_the_address_with_the_token_becomes_a_cookie(self, serve):
        client = serve(host="0.0.0.0", token=self.TOKEN)
        answer = client.get("/", params={"token": self.TOKEN})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith(f"review-8000={self.TOKEN};")
        assert "HttpOnly" in cookie
        assert "SameSite=lax" in cookie
        assert client.get("/api/status").status_code == 200  # the client keeps it
        assert client.get("/", params={"token": "x"}, headers={"Cookie": ""}).status_code in (200, 401)

    def test_names_that_are_bound_to_our_address_are_refused_even_so(self, serve):
        client = serve(host="0.0.0.0", token=self.TOKEN)
        good = {"Authorization": f"Bearer {self.TOKEN}"}
        assert client.get("/api/status", headers=good | {"Host": "evil.example"}).status_code == 421
        assert client.get("/api/status", headers=good | {"Host": "192.168.1.5:8000"}).status_code == 200
        assert client.get("/api/status", headers=good | {"Host": f"{socket.gethostname()}:8000"}).status_code == 200


# The real process.


class Server:
    """`python -m server` in a process of its own."""

    def __init__(self, *arguments, code="import server; server.run_step(server.main)"):
        command = [
            sys.executable,
            "-c",
            f"import sys; sys.argv[0] = 'server.py'; {code}",
            *map(str, arguments),
            "-p",
            "0",
        ]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        first = self.process.stdout.readline()
        if not first:
            raise AssertionError(self.process.communicate()[1])
        self.address = first.split(" on ")[1].strip()
        self.port = int(re.search(r":(\d+)/", self.address).group(1))
        wait_for(self.answers)

    def answers(self) -> bool:
        try:
            return raw_get(self.port, "/api/status")[0] in (200, 401)
        except OSError:
            return False

    def post(self, path, data) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        origin = {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(data), origin)
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found

    def get(self, path) -> dict:
        return json.loads(raw_get(self.port, path)[1])

    def stop(self, number=signal.SIGINT) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, err = self.process.communicate(timeout=20)
        return self.process.returncode, err


def raw_get(port, path) -> tuple[int, bytes]:
    """GET exactly this path: clients would mend it."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
        data = b""
        while piece := connection.recv(65536):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    if not head:
        raise ConnectionError("no answer")
    return int(head.split()[1]), body


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    running = Server(write_jsonl(folder / "p.jsonl", ROWS))
    yield running
    running.stop()


class TestProcess:
    def test_starts_without_torch_and_ends_with_ctrl_c(self, tmp_path):
        path = write_jsonl(tmp_path / "p.jsonl", ROWS)
        watch = (
            "import atexit, server; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
            "server.run_step(server.main)"
        )
        running = Server(path, code=watch)
        assert running.get("/api/status")["rows"] == 6
        assert running.stop() == (0, "Stopped\nFalse\n")
        assert not log_path(path).exists()

    def test_kill_while_editing_loses_no_accepted_edit(self, tmp_path):
        path = write_jsonl(tmp_path / "p.jsonl", [row(k, "A") | {"actual": "B"} for k in range(50)])
        accepted: dict[int, str] = {}
        unanswered: dict[int, str] = {}  # that came after the accepted one
        before = path.read_bytes()
        for turn in range(4):
            running = Server(path)

            def edit(running=running, turn=turn):
                for number in range(10_000):
                    place, text = number % 50, f"{turn}-{number} ä\n" * (number % 40 + 1)
                    unanswered[place] = text
                    try:
                        version = running.get(f"/api/row?row={place}")["review"]["version"]
                        body = {"row": place, "generation": 1, "version": version, "expected": text}
                        status, _ = running.post("/api/review", body | {"reviewed": True, "flagged": False})
                    except (OSError, http.client.HTTPException, ValueError):
                        return
                    assert status == 200
                    accepted[place] = text
                    del unanswered[place]

            editor = threading.Thread(target=edit)
            known = len(accepted)
            editor.start()
            wait_for(lambda known=known: len(accepted) > min(known, 20))
            time.sleep(0.3 + 0.07 * turn)
            running.stop(signal.SIGKILL)
            editor.join()
        assert len(accepted) >= 20
        running = Server(path)
        try:
            last = {k: running.get(f"/api/row?row={k}")["expected"] for k in accepted}
            # A kill may come between the disk and the answer: then the row is one edit further than the editor knows.
            assert len(unanswered) <= 4
            assert all(last[k] in (accepted[k], unanswered.get(k)) for k in accepted)
        finally:
            running.stop()
        for line in log_path(path).read_bytes().splitlines(keepends=True):
            assert line.endswith(b"\n")
            assert json.loads(line)["reviewed"] is True
        assert path.read_bytes() == before

    def test_slow_clients_are_let_go_and_the_others_served(self, tmp_path):
        path = write_jsonl(tmp_path / "p.jsonl", ROWS)
        hurry = (
            "import mistral_ft.review.guard as s; s.REQUEST_SECONDS = 1; import server; server.run_step(server.main)"
        )
        running = Server(path, code=hurry)
        try:
            starts = [
                b"",
                b"GET /api/status HTTP/1.1\r\nHost: 127.0",
                b"POST /api/review HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\n"
                b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
            ]
            slow = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(60)]
            for number, connection in enumerate(slow):
                connection.sendall(starts[number % 3])
            assert running.get("/api/status")["rows"] == 6
            for connection in slow:
                connection.settimeout(10)
                with contextlib.suppress(ConnectionResetError):
                    while connection.recv(1000):
                        pass
                connection.close()
            assert running.get("/api/status")["rows"] == 6
            assert "Traceback" not in running.stop()[1]
        finally:
            running.stop(signal.SIGKILL)

    def test_a_reader_that_stands_still_is_let_go(self, tmp_path):
        path = write_jsonl(tmp_path / "p.jsonl", [row(0, "A", ["large.bmp"])])
        Image.effect_noise((3000, 3000), 90).save(tmp_path / "large.bmp")  # some MB as JPEG
        hurry = "import mistral_ft.review.guard as s; s.STALL_SECONDS = 1; import server; server.run_step(server.main)"
        running = Server(path, code=hurry)
        try:
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", running.port))
            reader.sendall(b"GET /api/image?row=0&image=0&page=0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert reader.recv(12) == b"HTTP/1.1 200"
            time.sleep(2.5)
            size = 0
            with contextlib.suppress(ConnectionResetError):
                while piece := reader.recv(1 << 20):
                    size += len(piece)
            reader.close()
            whole = len(raw_get(running.port, "/api/image?row=0&image=0&page=0")[1])
            assert size < whole
        finally:
            running.stop(signal.SIGKILL)

    def test_garbage_and_endless_headers(self, server):
        for data in (b"\x16\x03\x01" * 100, b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 100_000, b"\r\n" * 10_000,
                     b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000):  # fmt: skip
            with (
                socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
                contextlib.suppress(ConnectionResetError, BrokenPipeError),
            ):
                connection.sendall(data)
                assert connection.recv(100)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 421", b"")
        assert server.get("/api/status")["rows"] == 6

    def test_a_token_that_is_made_up_is_printed(self, tmp_path):
        running = Server(write_jsonl(tmp_path / "p.jsonl", ROWS), "--host", "0.0.0.0", "--token")
        try:
            token = running.address.split("?token=")[1]
            assert len(token) >= 32
            assert raw_get(running.port, "/")[0] == 401
            assert raw_get(running.port, f"/?token={token}")[0] == 303
        finally:
            running.stop()

    def test_mistakes_are_one_line(self, tmp_path, run_cli, server):
        path = write_jsonl(tmp_path / "p.jsonl", ROWS)
        cases = {
            ("nowhere.jsonl",): "error: nowhere.jsonl: no such file",
            (tmp_path,): f"error: {tmp_path}: is a folder; expected a JSONL file in it",
            (path, "-i", "nowhere"): "error: nowhere: no such folder of images; give it with -i",
            (path, "-p", "99999"): "error: --port 99999: must be between 0 and 65535",
            (path, "-p", server.port): f"error: cannot listen at 127.0.0.1, port {server.port}: ",
            (path, "--compare", path): f"error: --compare {path}: is the file itself",
            (path, "--host", "no.such.host.invalid", "--token"): "error: cannot listen at no.such.host.invalid",
        }
        for arguments, line in cases.items():
            code, _, err = run_cli("server", *arguments)
            assert (code, err.startswith(line), err.count("\n")) == (2, True, 1), err

    @pytest.mark.slow
    def test_a_large_file_is_indexed_by_other_processes(self, tmp_path):
        text = (json.dumps(ROWS[1]) + "\n") * 1000
        with open(tmp_path / "p.jsonl", "w") as file:
            for _ in range(150):
                file.write(text)
        assert (tmp_path / "p.jsonl").stat().st_size > 5 * review_index.CHUNK_BYTES
        running = Server(tmp_path / "p.jsonl")
        try:
            wait_for(lambda: running.get("/api/status")["ready"], 240)
            assert running.get("/api/status")["rows"] == 150_000
            assert running.get("/api/view?show=errors&count=1")["total"] == 150_000
            assert running.get("/api/find?line=149999") == {"row": 149_998}
        finally:
            running.stop()


def test_everything_works_where_the_folder_cannot_be_found_again(serve, tmp_path):
    """A file that is removed while it is reviewed stays readable until the server ends."""
    client = serve()
    shutil.move(tmp_path / "p.jsonl", tmp_path / "moved.jsonl")
    time.sleep(1)
    assert client.get("/api/row?row=1").json()["expected"] == "Brown fox"
