"""Who may ask the review server, for what, and what everyone else gets."""

import re
import socket

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mistral_ft.review.log import log_path
from mistral_ft.review.page_files import find_page
from tests.conftest import ROOT, make_page, row, write_jsonl
from tests.helpers.review import HOST, ROWS, json_headers, raw_get

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
