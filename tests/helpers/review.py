"""What tests of the review server share: rows, a client's calls, a server as a process of its own."""

import http.client
import itertools
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

from mistral_ft.review.index import RowIndex, index_part, line_starts
from tests.conftest import ROOT, row

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


OTHER = [row(1, "Brown fox", ["1.png"]) | {"actual": "Brown fox"}, ROWS[0] | {"actual": "wrong"}, ROWS[2]]


def read_index(path) -> RowIndex:
    """The index of a file, read to its end."""
    index = RowIndex(path)
    for start, stop in itertools.pairwise(line_starts(index.path, 0, index.size)):
        index.add(index_part(index.path, start, stop))
    return index


def write_status(folder: Path, seconds_ago: float = 0, **fields) -> Path:
    """A run's status file, by default of this process, which is alive."""
    folder.mkdir(parents=True, exist_ok=True)
    updated = datetime.now(timezone.utc) - timedelta(seconds=seconds_ago)
    status = {"pid": os.getpid(), "host": platform.node(), "updated": updated.isoformat(timespec="seconds")} | fields
    (folder / "status.json").write_text(json.dumps(status))
    return folder


def json_headers():
    return {"Origin": HOST, "Content-Type": "application/json"}


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
