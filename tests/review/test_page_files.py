"""Pages that the review server shows, and those it refuses."""

import base64
import io
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mistral_ft.data.pages import page_sizes
from mistral_ft.review.page_files import render_page
from tests.conftest import make_page, row


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
