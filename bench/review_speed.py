"""Time the review server on made-up predictions: first page, filters, orders, searches, decisions, and its memory.

python -m bench.review_speed /tmp/predictions.jsonl --rows 100000
"""

import argparse
import contextlib
import http.client
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlencode

from bench.score_million import prediction
from mistral_ft.files import atomic_write

QUERIES = {
    "filter: errors": {"show": "errors"},
    "filter: a field's value": {"field": "language", "value": "fr"},
    "sort: confidence": {"sort": "confidence"},
    "sort: CER, worst first": {"sort": "cer", "descending": 1},
    "errors by confidence": {"show": "errors", "sort": "confidence"},
    "search: few rows": {"text": "page-0012345"},
    "search: a fifth of the rows": {"text": "Harbour"},
    "search: all rows": {"text": "what is the title"},
}
REPEATS = 5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    titles, answers = random.Random(0), random.Random(1)
    with atomic_write(args.file) as file:
        for number in range(args.rows):
            row = prediction(number, titles, answers) | {"language": ("en", "de", "fr", "es", "it")[number % 5]}
            file.write(json.dumps(row) + "\n")
    print(f"{args.rows:,} rows, {args.file.stat().st_size >> 20} MiB")

    started = time.perf_counter()
    command = [sys.executable, "-m", "server", str(args.file), "-p", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, contextlib.ExitStack() as stack:
        stack.callback(server.terminate)  # whatever goes wrong here, or Popen would wait for it
        port = int(server.stdout.readline().rsplit(":", 1)[1].strip().strip("/"))
        client = Client(port)
        client.wait()
        client.get("/")
        client.get("/api/view?count=100")
        client.get("/api/row?row=0")
        print(f"first page, from the command on     {time.perf_counter() - started:8.2f} s")
        slowest = 0.0
        while not client.get("/api/status")["ready"]:
            before = time.perf_counter()
            client.get("/api/view?count=100")
            slowest = max(slowest, time.perf_counter() - before)
            time.sleep(0.05)
        print(f"all rows indexed                    {time.perf_counter() - started:8.2f} s")
        print(f"slowest list in the meantime        {1000 * slowest:8.0f} ms")
        for name, query in QUERIES.items():
            seconds, total = [], 0
            for _ in range(REPEATS):
                before = time.perf_counter()
                total = client.get(f"/api/view?{urlencode(query | {'count': 100})}")["total"]
                seconds.append(time.perf_counter() - before)
            print(f"{name:<36}{1000 * statistics.median(seconds):8.0f} ms  {total:9,} rows")
        view = client.get("/api/view?show=errors&sort=cer")["view"]
        before = time.perf_counter()
        client.get(f"/api/scores?view={view}")
        print(f"numbers of all errors               {time.perf_counter() - before:8.2f} s")
        seconds = []
        for row in range(args.rows - 20, args.rows):
            before = time.perf_counter()
            body = {"row": row, "generation": 1, "version": 0, "expected": "x", "reviewed": True, "flagged": False}
            client.post("/api/review", body)
            seconds.append(time.perf_counter() - before)
        print(f"a decision, on the disk             {1000 * statistics.median(seconds):8.1f} ms")
        status = Path(f"/proc/{server.pid}/status").read_text()
        memory = {line.split(":")[0]: int(line.split()[1]) >> 10 for line in status.splitlines() if "kB" in line}
        print(
            f"memory                              {memory['VmRSS']:8} MiB, of it {memory['RssAnon']} MiB not of files"
        )
    Path(f"{args.file}.review.jsonl").unlink()


class Client:
    """A connection that is kept open, as a browser's is."""

    def __init__(self, port: int):
        self.port = port
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

    def wait(self) -> None:
        while True:
            try:
                return self.connection.connect()
            except ConnectionRefusedError:
                time.sleep(0.01)

    def get(self, path: str):
        return self._request("GET", path)

    def post(self, path: str, data: dict):
        return self._request("POST", path, json.dumps(data))

    def _request(self, method: str, path: str, body: str | None = None):
        headers = {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/json"}
        try:
            self.connection.request(method, path, body, headers)
            response = self.connection.getresponse()
        except (ConnectionError, http.client.RemoteDisconnected):  # closed while it was idle
            self.connection.close()
            self.connection.request(method, path, body, headers)
            response = self.connection.getresponse()
        data = response.read()
        assert response.status == 200, data
        return json.loads(data) if path.startswith("/api/") else data


if __name__ == "__main__":
    main()
