"""The review server's answers: lists, a record, numbers, comparisons."""

import json
import os
import shutil

import numpy as np
import pytest

from mistral_ft.review import index as review_index
from mistral_ft.review.log import Review, ReviewLog
from mistral_ft.scoring.diff import diff
from tests.conftest import TINY, make_page, row, write_jsonl
from tests.helpers.review import OTHER, ROWS, THOUGHT, decide, ids, read_index, wait_for


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

    def test_several_right_answers(self, serve):
        rows = [row(0, ["12 May", "12.05.", "May 12"]) | {"actual": "12.06."}, row(1, ["A", "B"]) | {"actual": "B"}]
        client = serve(rows)
        shown = client.get("/api/row?row=0").json()
        assert (shown["expected"], shown["others"]) == ("12 May", ["12.05.", "May 12"])
        assert (shown["right"], shown["editable"], shown["problem"]) == (False, True, None)
        assert shown["diff"]["nearest"] == 1
        assert shown["diff"]["words"] == [["12.", "12."], ["05", "06"], [".", "."]]
        assert shown["metrics"]["cer"] == pytest.approx(1 / 6)
        assert ids(client, show="correct") == ["1"]
        assert ids(client, text="may 12") == ["0"]
        first = client.get("/api/view", params={"sort": "length"}).json()["first"]
        assert [summary["expected"] for summary in first] == ["A", "12 May"]

    def test_json_among_several_right_answers(self, serve):
        client = serve([row(0, ["none", '{"sum": 4, "tax": 1}', '{"sum": 5}']) | {"actual": '{"sum": 5, "tax": 3}'}])
        assert client.get("/api/row?row=0").json()["json_fields"] == [
            ["sum", "5", "5", True, None], ["tax", None, "3", False, None],
        ]  # fmt: skip

    def test_a_list_of_no_right_answers_is_shown_with_what_is_wrong(self, serve):
        client = serve([row(0) | {"expected": ["A", 1], "actual": "A"}, row(1) | {"expected": [], "actual": "A"}])
        shown = [client.get("/api/row", params={"row": k}).json() for k in range(2)]
        assert [one["expected"] for one in shown] == ['["A", 1]', "[]"]
        assert (
            shown[0]["problem"]
            == "answer 2 in `expected` must be a string, got the number 1; put JSON answers in quotes"
        )
        assert [(one["right"], one["editable"], one["others"]) for one in shown] == [(None, False, [])] * 2

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
        assert shown[3].json()["fields"] == [["x", None]]

    def test_tokens_are_those_of_the_encoder(self, serve, pages):
        client = serve(pages / "train.jsonl", model=TINY)
        shown = client.get("/api/token_view?row=0").json()
        image = next(part for part in shown["stretches"] if part["kind"] == "image")
        assert (image["grid"], image["size"], image["fed"]) == ([4, 2], [56, 112], [56, 112])
        assert shown["image"] == 12
        learned = [text for part in shown["stretches"] if part["learned"] for text in part["texts"]]
        assert "".join(learned) == "Decree 20 on Salt</s>"
        several = serve(write_jsonl(pages / "several.jsonl", [row(0, ["A", "B"])]), model=TINY)
        shown = several.get("/api/token_view?row=0").json()
        learned = [text for part in shown["stretches"] if part["learned"] for text in part["texts"]]
        assert "".join(learned) == "A</s>"
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

    def test_other_files_are_held_against_all_right_answers(self, serve, tmp_path):
        other = write_jsonl(tmp_path / "o.jsonl", [row(0, "A") | {"actual": "B"}, row(1, ["A"]) | {"actual": "x"}])
        client = serve([row(0, ["A", "B"]) | {"actual": "x"}, row(1, "A") | {"actual": "A"}], other=other)
        shown = [client.get("/api/row", params={"row": k}).json() for k in range(2)]
        assert [(one["other"]["right"], one["other"]["expects_otherwise"]) for one in shown] == [
            (True, True), (False, False),
        ]  # fmt: skip
        assert [one["change"] for one in shown] == ["broken", "fixed"]
        assert shown[0]["other"]["diff"]["nearest"] == 1


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

    def test_of_several_right_answers_with_corrections(self, serve):
        client = serve(
            [row(0, ["A", "B"]) | {"actual": "B"}, row(1, ["A", "B"]) | {"actual": "C"}, row(2) | {"actual": ""}]
        )
        decide(client, 0, expected="Z")
        view = client.get("/api/view").json()["view"]
        scores = client.get("/api/scores", params={"view": view}).json()
        assert (scores["hits"], scores["count"], scores["corrected"]) == (1, 2, 1)  # "B" is right still
        decide(client, 1, expected="C")
        assert client.get("/api/scores", params={"view": view}).json()["hits"] == 2

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
