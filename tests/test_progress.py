"""Progress where there is no terminal: lines that promise nothing before there is a pace."""

import time

from mistral_ft.progress import Progress


def test_no_time_left_before_there_is_a_pace(capsys, monkeypatch):
    clock = iter([0, 30, 40, 60, 60.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    progress = Progress("reading", 6, "page", seconds=15)
    for count in (1, 1, 1, 3):
        progress.update(count, "well")
    assert capsys.readouterr().err.splitlines() == [
        "reading: page 1/6, well",
        "reading: page 3/6, well, 0.05 pages/s, 01:00 left",
        "reading: page 6/6, well, 0.0992 pages/s, 00:00 left",
    ]


def test_the_last_line_is_told_once(capsys):
    progress = Progress("reading", 2, "page")
    for count in (1, 1, 0, 0):
        progress.update(count)
    assert [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "reading: page 1/2",
        "reading: page 2/2",
    ]
