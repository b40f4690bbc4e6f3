"""Decisions are on the disk before they are shown; the corrected rows come out as train takes them."""

import json
import os

import pytest

from mistral_ft.data.records import read_records
from mistral_ft.errors import UserError
from mistral_ft.review.export import export
from mistral_ft.review.log import Outdated, Review, ReviewLog, log_path
from tests.conftest import make_page, read_rows, row, write_jsonl
from tests.helpers.review import HOST, ROWS, decide, ids, read_index


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

    def test_a_correction_keeps_the_other_right_answers(self, serve, tmp_path):
        rows = [row(k, ["A", "B", "C"]) | {"actual": "B"} for k in range(4)] + [row(4, ["A"]), row(5, "A")]
        client = serve(rows)
        decide(client, 0, reviewed=True)
        for number, text in ((1, "Z"), (2, "B"), (3, "A"), (4, "Z"), (5, "Z")):
            decide(client, number, expected=text, reviewed=True)
        shown = [client.get("/api/row", params={"row": k}).json() for k in range(6)]
        assert [(one["expected"], one["others"]) for one in shown] == [
            ("A", ["B", "C"]), ("Z", ["B", "C"]), ("B", ["A", "C"]), ("A", ["B", "C"]), ("Z", []), ("Z", []),
        ]  # fmt: skip
        assert [one["source_expected"] for one in shown] == ["A"] * 6
        assert ids(client, show="edited") == ["1", "2", "4", "5"]  # what the file says is no correction
        assert [r["expected"] for r in read_rows(log_path(tmp_path / "p.jsonl"))] == [None, "Z", "B", None, "Z", "Z"]
        assert export(tmp_path / "p.jsonl", tmp_path / "out.jsonl").edited == 4
        assert [r["expected"] for r in read_rows(tmp_path / "out.jsonl")] == [
            ["A", "B", "C"], ["Z", "B", "C"], ["B", "A", "C"], ["A", "B", "C"], ["Z"], "Z",
        ]  # fmt: skip
        decide(client, 1, expected=None, reviewed=False)
        assert client.get("/api/row?row=1").json()["expected"] == "A"

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
