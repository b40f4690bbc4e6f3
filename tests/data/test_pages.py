"""Every way to name an image leads to the same picture in every step; large scans are decoded in part."""

import base64
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader

from mistral_ft.data.dataset import RecordDataset, measure_records
from mistral_ft.data.image_fitter import ImageFitter
from mistral_ft.data.pages import MAX_PIXELS, fingerprint, limit_pages, open_image, page_size, page_sizes
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import read_records
from mistral_ft.data.references import check_reference, expand, expand_pages, resolve, split_page
from mistral_ft.errors import UserError
from mistral_ft.prediction.batch_plan import page_lengths
from tests.conftest import TINY, make_page, read_rows, row, write_jsonl


@pytest.fixture(scope="module")
def fitter():
    return ImageFitter.from_folder(TINY)


@pytest.fixture(scope="module")
def processor():
    return Processor.from_folder(TINY)


GREYS = (0, 100, 200)
SIZES = [(80, 60), (90, 60), (100, 60)]


@pytest.fixture
def folder(tmp_path):
    """three.pdf and three.tif: pages of one grey each, and of different widths."""
    sheets = [Image.new("L", size, grey) for size, grey in zip(SIZES, GREYS, strict=True)]
    for kind in ("tif", "pdf"):  # Pillow cannot save an image as TIFF that it saved as PDF
        sheets[0].save(tmp_path / f"three.{kind}", save_all=True, append_images=sheets[1:])
    for kind in ("tif", "pdf"):
        Image.new("L", SIZES[1], 100).save(tmp_path / f"one.{kind}")
    make_page(tmp_path / "a.png", 5)
    return tmp_path


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def scan(width: int, height: int) -> Image.Image:
    """A page of print, letters 10 pixels high when it is fed."""
    image = Image.new("RGB", (width, height), "white")
    size = max(width, height) // 110
    text = "\n".join("The quick brown fox jumps over the lazy dog 0123456789 " * 2 for _ in range(height // size))
    ImageDraw.Draw(image).multiline_text((size, size), text, "black", ImageFont.load_default(size))
    return image


class TestReferences:
    @pytest.mark.parametrize(
        ("reference", "pages"),
        [
            ("a.png", ["a.png"]),
            ("a#1.png", ["a#1.png"]),
            ("a.pdf#page=3", ["a.pdf#page=3"]),
            ("a.pdf#page=2-4", ["a.pdf#page=2", "a.pdf#page=3", "a.pdf#page=4"]),
            ("a.pdf#page=2-2", ["a.pdf#page=2"]),
            ("data:a;base64,AA#page=1-2", ["data:a;base64,AA#page=1", "data:a;base64,AA#page=2"]),
        ],
    )  # fmt: skip
    def test_one_per_page(self, reference, pages):
        check_reference(reference)
        assert expand(reference) == pages

    def test_parts(self):
        assert split_page("a-b.pdf#page=3") == ("a-b.pdf", 2)
        assert split_page("a-b.pdf") == ("a-b.pdf", None)
        assert resolve("b/a.pdf#page=3", Path("/x")) == "/x/b/a.pdf#page=3"
        assert resolve("/y/a.pdf", Path("/x")) == "/y/a.pdf"
        assert resolve("data:image/png;base64,AA", Path("/x")) == "data:image/png;base64,AA"

    def test_messages_stay_as_they_are(self):
        messages = row(0, images=["a.pdf#page=1-2", "b.png"])["messages"]
        copy = pickle.loads(pickle.dumps(messages))
        assert [block.get("image") for block in expand_pages(messages)[0]["content"]] == [
            None, "a.pdf#page=1", "a.pdf#page=2", "b.png",
        ]  # fmt: skip
        assert messages == copy


class TestPages:
    def test_of_a_tiff(self, folder):
        for page, (size, grey) in enumerate(zip(SIZES, GREYS, strict=True), 1):
            image = open_image(f"{folder}/three.tif#page={page}")
            assert image.size == page_size(f"{folder}/three.tif#page={page}") == size
            assert image.getpixel((5, 5)) == (grey, grey, grey)
        assert page_sizes(f"{folder}/three.tif", 2) == SIZES[:2]
        assert page_sizes(f"{folder}/three.tif#page=3", 2) == SIZES[2:]
        assert open_image(f"{folder}/one.tif").size == open_image(f"{folder}/one.tif#page=1").size == SIZES[1]

    def test_of_a_pdf_at_the_size_that_is_fed(self, folder, fitter):
        for page, (size, grey) in enumerate(zip(SIZES, GREYS, strict=True), 1):
            reference = f"{folder}/three.pdf#page={page}"
            image = open_image(reference, fitter)
            assert image.size == page_size(reference, fitter) == (1540, -(-1540 * size[1] // size[0]))
            assert abs(image.getpixel((700, 500))[0] - grey) <= 2
            assert open_image(reference).size == page_size(reference) == tuple(-(-side * 200 // 72) for side in size)
        assert open_image(f"{folder}/one.pdf", fitter).size == (1540, 1027)

    @pytest.mark.parametrize("size", [(595.276, 841.89), (612, 792), (14400, 30), (3, 5), (841.8898, 595.2756)])
    def test_no_pixel_is_added_to_a_pdf_by_rounding(self, tmp_path, fitter, size):
        import pypdfium2

        pdf = pypdfium2.PdfDocument.new()
        pdf.new_page(*size)
        pdf.save(tmp_path / "a.pdf")
        image = open_image(f"{tmp_path}/a.pdf", fitter)
        assert image.size == page_size(f"{tmp_path}/a.pdf", fitter)
        assert max(image.size) == 1540
        assert image.getpixel((0, 0)) == (255, 255, 255)

    def test_data_urls_are_the_file(self, folder):
        url = data_url(folder / "a.png")
        assert open_image(url).tobytes() == open_image(folder / "a.png").tobytes()
        assert page_size(url) == (84, 56)
        assert fingerprint(url) == fingerprint(f"{folder}/a.png") == fingerprint(f"{folder}/a.png#page=1")
        pdf = base64.b64encode((folder / "three.pdf").read_bytes()).decode()
        assert page_size(f"data:application/pdf;base64,{pdf}#page=3") == page_size(f"{folder}/three.pdf#page=3")

    def test_pages_of_a_file_have_fingerprints_of_their_own(self, folder):
        assert (
            len({fingerprint(f"{folder}/three.{kind}#page={page}") for kind in ("pdf", "tif") for page in (1, 2, 3)})
            == 6
        )

    def test_only_the_first_frame_of_a_gif_is_a_page(self, tmp_path):
        frames = [Image.new("L", (30, 20), grey) for grey in GREYS]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        assert open_image(tmp_path / "a.gif").getpixel((0, 0)) == (0, 0, 0)

    def test_pdfs_in_threads(self, folder, fitter):
        found: list[int] = []

        def draw(page: int) -> None:
            found.append(open_image(f"{folder}/three.pdf#page={page}", fitter).height)

        jobs = [threading.Thread(target=draw, args=(page,)) for page in (1, 2, 3) * 8]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert sorted(found) == [924] * 8 + [1027] * 8 + [1155] * 8


class TestSteps:
    """A range, a TIFF's page and an embedded image are what separate files of the same pages are."""

    @pytest.fixture
    def files(self, folder):
        for page in (1, 2, 3):
            open_image(f"{folder}/three.tif#page={page}").save(folder / f"{page}.png")
        ranges = write_jsonl(
            folder / "ranges.jsonl", [row(0, "A", ["three.tif#page=1-3"]), row(1, "B", [data_url(folder / "2.png")])]
        )
        single = write_jsonl(
            folder / "single.jsonl", [row(0, "A", ["1.png", "2.png", "3.png"]), row(1, "B", ["2.png"])]
        )
        return ranges, single

    def test_examples_are_equal(self, files, processor):
        ranges, single = (RecordDataset(read_records([path]), processor) for path in files)
        for number in range(2):
            ours, theirs = ranges[number], single[number]
            assert ours.input_ids == theirs.input_ids
            assert ours.labels == theirs.labels
            assert ours.image_sizes == theirs.image_sizes
            assert all(np.array_equal(a, b) for a, b in zip(ours.pixel_values, theirs.pixel_values, strict=True))
        assert len(ranges[0].pixel_values) == 3

    def test_sizes_are_equal(self, files, processor):
        ranges, single = (read_records([path]) for path in files)
        assert measure_records(ranges, processor, 2048) == measure_records(single, processor, 2048)
        assert page_lengths(ranges, processor) == page_lengths(single, processor)

    def test_train_and_predict_take_them(self, folder, train_tiny, run_cli, small_pages_base):
        rows = [
            row(0, "A", ["three.pdf#page=1-2"]),
            row(1, "B", [data_url(folder / "a.png")]),
            row(2, "C", ["one.tif"]),
        ]
        path = write_jsonl(folder / "train.jsonl", rows)
        run = train_tiny(path, "--max_steps", 1, "--model_id", small_pages_base)
        code, _, err = run_cli("predict", path, run, "-o", folder / "out.jsonl", "--max_new_tokens", 1)
        assert code == 0, err
        assert [answer["messages"] for answer in read_rows(folder / "out.jsonl")] == [r["messages"] for r in rows]

    def test_train_names_a_pdf_whose_page_is_not_named(self, folder, run_cli):
        path = write_jsonl(folder / "train.jsonl", [row(0, "A", ["three.pdf"])])
        code, _, err = run_cli("train", "--model_id", TINY, "--dataset", path, "--output_dir", folder / "output")
        assert code == 2
        assert err.splitlines()[-1] == (
            f"error: {path}:1: image {folder}/three.pdf cannot be opened: it has 3 pages: add #page=1 to the path for "
            "one, or #page=1-3 for all of them"
        )

    def test_the_same_page_of_a_pdf_in_train_and_test(self, folder, run_cli):
        train = write_jsonl(folder / "train.jsonl", [row(0, "A", ["three.pdf#page=1-2"])])
        test = write_jsonl(
            folder / "test.jsonl", [row(0, "A", ["three.pdf#page=3"]), row(1, "B", ["three.pdf#page=2"])]
        )
        code, out, _ = run_cli("validate_data", train, "--eval", test, "--model_id", TINY)
        assert code == 0
        leaks = [line for line in out.splitlines() if "in training too" in line]
        assert leaks == [f"{test}:2: warning: a page of it is in training too, at {train}:1; remove one"]
        assert "2 rows, 4 images" not in out
        assert "3 rows, 4 images" in out


class TestLargeScans:
    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_a_jpeg_decoded_in_part_is_nearly_the_same(self, tmp_path, fitter, orientation, mode):
        """Dense print at 600 dpi, odd sizes: on average 0.7 of 255 grey levels apart, 99 % of the pixels at most 7."""
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        scan(4961, 7015).convert(mode).save(tmp_path / "a.jpg", quality=85, exif=exif)
        path = f"{tmp_path}/a.jpg"
        whole, part = open_image(path), open_image(path, fitter)
        assert (
            whole.size
            == page_size(path)
            == page_size(path, fitter)
            == ((4961, 7015) if orientation == 1 else (7015, 4961))
        )
        assert part.size == ((1092, 1540) if orientation == 1 else (1540, 1092))
        apart = np.abs(fitter.pixels(whole) - fitter.pixels(part)) * np.reshape(fitter.std, (3, 1, 1)) * 255
        assert apart.mean() < 1
        assert np.quantile(apart, 0.99) < 10

    @pytest.mark.parametrize("size", [(6159, 4350), (3000, 2000), (1600, 9000)])
    def test_what_would_lose_print_is_decoded_in_full(self, tmp_path, fitter, size):
        """A half must have twice the pixels that are fed, on both sides: the last page is fed 280 pixels wide."""
        Image.new("L", size, 255).save(tmp_path / "a.jpg")
        assert open_image(tmp_path / "a.jpg", fitter).size == (size if size[1] < 9000 else (280, 1540))

    def test_tokens_never_depend_on_it(self, tmp_path, fitter):
        rng = np.random.default_rng(0)
        reduced = 0
        for _ in range(30):
            size = tuple(map(int, rng.integers(3000, 9000, 2)))
            Image.new("L", size, 255).save(tmp_path / "a.jpg", quality=10)
            image = open_image(tmp_path / "a.jpg", fitter)
            assert fitter.grid(*image.size) == fitter.grid(*size)
            reduced += image.size != size
        assert 15 < reduced < 30


class TestMostPixels:
    @pytest.fixture(autouse=True)
    def _restore(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        monkeypatch.setenv(MAX_PIXELS, "178956970")

    def test_the_limit_reaches_workers(self, folder, processor):
        dataset = RecordDataset(read_records([write_jsonl(folder / "a.jsonl", [row(0, "A", ["a.png"])])]), processor)
        limit_pages(1000, None)
        loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
        with pytest.raises(
            UserError, match="a.png has more than 0 million pixels; scale it down, or raise --max_image_p"
        ):
            list(loader)
        limit_pages(84 * 56, None)
        assert open_image(folder / "a.png").size == (84, 56)

    @pytest.mark.parametrize("step", ["train", "predict", "validate_data"])
    def test_the_flag(self, pages, run_cli, step, tmp_path):
        data = pages / "train.jsonl"
        command = {
            "train": ["--model_id", TINY, "--dataset", data, "--output_dir", tmp_path / "output", "--max_steps", 1],
            "predict": [data, TINY, "-o", tmp_path / "out.jsonl", "--max_new_tokens", 1, "--overwrite"],
            "validate_data": [data],
        }[step]
        code, out, err = run_cli(step, *command, "--max_image_pixels", 5000)
        assert code == (2 if step == "train" else 1)
        assert "0.png has more than 0 million pixels; scale it down, or raise --max_image_pixels" in out + err
        assert run_cli(step, *command, "--max_image_pixels", 7000)[0] == 0
        code, _, err = run_cli(step, *command, "--max_image_pixels", 0)
        assert (code, err) == (2, "error: --max_image_pixels 0: must be at least 1\n")
