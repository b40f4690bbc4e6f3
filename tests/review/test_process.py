"""The review server as a process: its port, its signals, its load."""

import contextlib
import http.client
import json
import shutil
import signal
import socket
import threading
import time

import pytest
from PIL import Image

from mistral_ft.review import index as review_index
from mistral_ft.review.log import log_path
from tests.conftest import row, write_jsonl
from tests.helpers.review import ROWS, Server, raw_get, wait_for


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
