"""The index over a file, also while the file grows or is replaced."""

import json
import os
import time

from mistral_ft.data.predictions import Predictions
from mistral_ft.review import index as review_index
from mistral_ft.review.index import line_starts
from tests.conftest import row, write_jsonl
from tests.helpers.review import ROWS, decide, ids, read_index, wait_for


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
