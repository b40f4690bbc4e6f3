"""Runs in training, as the review server tells of them."""

import os
import shutil
import subprocess
import sys

import pytest

from mistral_ft.review import runs as review_runs
from mistral_ft.status import read_status
from tests.conftest import write_jsonl
from tests.helpers.review import ROWS, write_status


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
