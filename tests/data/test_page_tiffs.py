"""TIFFs of every layout, written by hand: each is read as it is meant, or refused by name."""

import io
import json
import struct

import numpy as np
import PIL
import pytest
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from mistral_ft.data.image_fitter import ImageFitter
from mistral_ft.data.pages import open_image, page_size, page_sizes
from mistral_ft.validation.checker import RowChecker, Source
from tests.conftest import TINY, row
from tests.helpers.handmade import frame, tiff

RAMP = np.array([[[0], [64], [128], [255]]], np.uint8)
LEVELS = np.array([[0, 64, 128, 255]])
RGB = np.array([[[255, 128, 64], [0, 32, 255]]], np.uint8)


@pytest.fixture
def read(tmp_path):
    def read(*frames, **layout) -> np.ndarray:
        (tmp_path / "a.tif").write_bytes(tiff(*frames, **layout))
        page = open_image(tmp_path / "a.tif")
        assert page.size == page_size(tmp_path / "a.tif")
        return np.asarray(page)

    return read


def scaled(dtype: str) -> np.ndarray:
    """The ramp over all values of a type."""
    if dtype == "f4":
        return (RAMP / 255).astype("f4")
    info = np.iinfo(dtype)
    return (RAMP.astype(object) * (int(info.max) - int(info.min)) // 255 + int(info.min)).astype(dtype)


class TestSamples:
    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("deflate", [False, True])
    @pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "i4", "f4"])
    def test_grey(self, read, dtype, order, deflate):
        page = read(frame(scaled(dtype), order=order, deflate=deflate), order=order)
        assert np.abs(page[..., 0] - LEVELS).max() <= 1
        assert (page[..., 0] == page[..., 2]).all()

    def test_unsigned_32_bits(self, read):
        assert read(frame(scaled("u4")))[0, :, 0].tolist() == [0, 64, 128, 255]

    @pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
    def test_white_is_zero(self, read, dtype):
        assert read(frame(scaled(dtype), 0))[0, :, 0].tolist() == [255, 191, 127, 0]

    def test_12_bits(self, read):
        tags, _ = frame(RAMP[:, :2], tags={258: (3, [12])})
        assert read((tags, [bytes([0x80, 0x0F, 0xFF])]))[0, :, 0].tolist() == [128, 255]

    @pytest.mark.parametrize(
        ("values", "levels"),
        [
            ([0, 0.5, 1.03, -0.02], [0, 128, 255, 0]),  # beyond white and black, as after resizing
            ([0, 100, 255, 300], [0, 100, 255, 255]),
            ([0, 5, 10, 20], [0, 64, 128, 255]),
            ([-1, 0, 1, 0.5], [0, 128, 255, 191]),
            ([0, np.inf, 1, np.nan], [0, 255, 255, 0]),
        ],
    )
    def test_floats(self, read, values, levels):
        assert read(frame(np.array(values, "f4").reshape(1, 4, 1)))[0, :, 0].tolist() == levels

    @pytest.mark.parametrize(
        ("dtype", "values", "levels"),
        [
            ("i2", [0, 100, 255, 30], [0, 100, 255, 30]),
            ("i2", [0, 100, 32767, 16384], [0, 1, 255, 128]),
            ("i2", [-100, 0, 100, 50], [78, 128, 178, 152]),
            ("i4", [0, 100, 255, 30], [0, 100, 255, 30]),
        ],
    )
    def test_signed_greys_are_not_clipped(self, read, dtype, values, levels):
        assert read(frame(np.array(values, dtype).reshape(1, 4, 1)))[0, :, 0].tolist() == levels

    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("deflate", [False, True])
    @pytest.mark.parametrize("planar", [False, True])
    @pytest.mark.parametrize("dtype", ["u1", "u2"])
    def test_rgb_in_planes_and_pixels(self, read, dtype, planar, deflate, order):
        samples = RGB.astype(dtype) * (257 if dtype == "u2" else 1)
        assert (read(frame(samples, 2, order, planar, deflate), order=order) == RGB).all()

    def test_subsampled_ycbcr_that_is_not_compressed(self, read):
        tags, _ = frame(np.zeros((2, 2, 3), np.uint8), 6, tags={530: (3, [2, 2])})
        page = read((tags, [bytes([255, 0, 255, 0, 128, 128])]))
        assert page[..., 1].tolist() == [[255, 0], [255, 0]]

    def test_lab(self, read):
        page = read(frame(np.array([[[255, 0, 0], [0, 0, 0], [136, 81, 70]]], np.uint8), 8)).astype(int)
        assert np.abs(page[0] - [[255] * 3, [0] * 3, [254, 0, 0]]).max() <= 5

    @pytest.mark.parametrize("alpha", [1, 2])
    @pytest.mark.parametrize("photometric", [1, 2])
    def test_alpha_is_over_white_paper(self, read, photometric, alpha):
        """Red or grey, of which an eighth, half and all covers the paper; ExtraSamples 1 is premultiplied."""
        colour = np.array([200] if photometric == 1 else [200, 0, 0])
        cover = np.array([0, 128, 255])[None, :, None]
        samples = colour * cover / 255 if alpha == 1 else colour + cover * 0
        samples = np.concatenate([samples.round(), cover], -1).astype(np.uint8)
        if photometric == 1 and alpha == 1 and PIL.__version__ < "13":
            pytest.skip("Pillow refuses them")
        page = read(frame(samples, photometric, tags={338: (3, [alpha])})).astype(int)
        rest = [255, 227, 200] if photometric == 1 else [255, 127, 0]  # of green and blue
        expected = [[red, other, other] for red, other in zip([255, 227, 200], rest, strict=True)]
        assert np.abs(page[0] - expected).max() <= 1

    @pytest.mark.parametrize(
        ("samples", "photometric", "how", "says"),
        [
            (np.zeros((2, 2, 1), "f8"), 1, {}, "1 float samples of 64 bits"),
            (np.zeros((2, 2, 3), "f4"), 2, {}, "3 float samples of 32 bits"),
            (np.zeros((2, 2, 3), "i2"), 2, {}, "3 signed samples of 16 bits"),
            (np.zeros((2, 2, 2), "u1"), 1, {"planar": True, "tags": {338: (3, [2])}}, "2 samples of 8 bits"),
            (np.zeros((2, 2, 4), "u1"), 2, {"planar": True}, "4 samples of 8 bits"),
            (np.zeros((2, 2, 1), "u1"), 1, {"tags": {259: (3, [34712])}}, "compression 34712"),
        ],
    )
    def test_what_pillow_does_not_read_is_named(self, read, samples, photometric, how, says):
        with pytest.raises(
            ValueError, match=f"Pillow does not read a TIFF with .*{says}.*; save it as 8-bit PNG or TIFF"
        ):
            read(frame(samples, photometric, **how))

    def test_a_file_that_is_cut_off_is_named(self, tmp_path):
        data = tiff(frame(np.zeros((200, 200, 1), np.uint8)))
        (tmp_path / "a.tif").write_bytes(data[:8000])
        with pytest.raises(ValueError, match="the TIFF is damaged: its frame 1 cannot be found; is the file cut off?"):
            page_size(tmp_path / "a.tif")
        Image.new("L", (200, 200)).save(tmp_path / "b.tif")
        (tmp_path / "b.tif").write_bytes((tmp_path / "b.tif").read_bytes()[:8000])
        with pytest.raises(ValueError, match="the TIFF is damaged or cut off"):
            open_image(tmp_path / "b.tif")


def grey(level: int, width: int, **tags) -> tuple:
    return frame(np.full((4, width, 1), level, np.uint8), tags={int(tag[1:]): value for tag, value in tags.items()})


class TestFrames:
    @pytest.mark.parametrize("big", [False, True])
    @pytest.mark.parametrize("order", "<>")
    def test_thumbnails_and_masks_are_no_pages(self, tmp_path, order, big):
        if big and order == ">":
            pytest.skip("Pillow does not know it")
        parts = [{254: (4, [1])}, {}, {254: (4, [2])}, {254: (3, [4])}, {255: (3, [2])}, {254: (4, [3])}, {}]
        frames = [frame(np.full((4, 10 + k, 1), k, np.uint8), order=order, tags=tags) for k, tags in enumerate(parts)]
        path = tmp_path / "a.tif"
        path.write_bytes(tiff(*frames, order=order, big=big))
        assert page_sizes(path, 9) == [(11, 4), (12, 4), (16, 4)]
        for page, level in enumerate((1, 2, 6), 1):
            assert open_image(f"{path}#page={page}").getpixel((0, 0)) == (level, level, level)
            assert page_size(f"{path}#page={page}") == (10 + level, 4)
        with pytest.raises(ValueError, match="it has 3 pages: add #page=1 to the path for one, or #page=1-3"):
            open_image(path)
        with pytest.raises(ValueError, match="it has no page 4, the last is 3"):
            open_image(f"{path}#page=4")

    def test_a_page_with_its_thumbnail_needs_no_number(self, read):
        assert read(grey(7, 9, t254=(4, [1])), grey(8, 10)).shape == (4, 10, 3)

    def test_a_thumbnail_of_nothing_is_the_page(self, read):
        assert read(grey(7, 9, t254=(4, [1]))).shape == (4, 9, 3)

    def test_the_preview_of_a_raw_file_is_not_the_page(self, read):
        with pytest.raises(
            ValueError, match="it shows a preview only, as a camera's raw file does: save its page as JPEG"
        ):
            read(grey(7, 9, t254=(4, [1]), t330=(4, [8])))

    def test_a_page_has_no_profile_or_density_of_the_one_before(self, tmp_path):
        dense = {"t282": (5, [204, 1]), "t283": (5, [98, 1])}
        (tmp_path / "a.tif").write_bytes(tiff(grey(7, 9, **dense), grey(8, 10)))
        assert page_sizes(tmp_path / "a.tif", 2) == [(9, 8), (10, 4)]
        assert open_image(f"{tmp_path}/a.tif#page=2").size == (10, 4)

    @pytest.mark.parametrize("back", [0, 1])
    def test_frames_in_a_circle_end(self, tmp_path, back):
        (tmp_path / "a.tif").write_bytes(tiff(grey(7, 9), grey(8, 10), loop_to=back))
        assert page_sizes(tmp_path / "a.tif", 9) == [(9, 4), (10, 4)]

    def test_directories_that_overlap_are_damage(self, tmp_path):
        """Each would be read to its end: a small file could keep a machine busy for hours."""
        many = bytearray(b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 60000) + bytes(1_400_000))
        (tmp_path / "a.tif").write_bytes(many)
        assert open_or_why(tmp_path / "a.tif").endswith("save it as 8-bit PNG or TIFF")
        for k in range(50):  # each directory has 60,000 entries and refers to one that starts two bytes later
            struct.pack_into("<H", many, 8 + 2 * k, 60000)
            struct.pack_into("<I", many, 10 + 2 * k + 720_000, 10 + 2 * k)
        (tmp_path / "a.tif").write_bytes(many)
        assert "the TIFF is damaged: its frame 2 cannot be found" in open_or_why(tmp_path / "a.tif")

    def test_the_last_of_thousands_of_pages(self, tmp_path, monkeypatch):
        """No other is read by Pillow, which takes as long for each directory as for a small page."""
        (tmp_path / "a.tif").write_bytes(tiff(*[grey(7, 9)] * 2999, grey(8, 10)))
        calls, load = [], ImageFileDirectory_v2.load
        monkeypatch.setattr(ImageFileDirectory_v2, "load", lambda tags, file: calls.append(1) or load(tags, file))
        assert open_image(f"{tmp_path}/a.tif#page=3000").size == (10, 4)
        assert len(calls) <= 4


def open_or_why(path) -> str:
    try:
        return str(open_image(path))
    except ValueError as error:
        return str(error)


class TestDensity:
    """A fax of 204 x 98 dpi has half the rows that it should."""

    @pytest.mark.parametrize("orientation", [1, 6])
    @pytest.mark.parametrize(
        ("across", "down", "unit", "size"),
        [
            ((204, 1), (98, 1), 2, (204, 208)),
            ((204, 1), (196, 1), 2, (204, 104)),
            ((100, 1), (200, 1), 2, (408, 100)),
            ((80315, 1000), (38583, 1000), 3, (204, 208)),
            ((2, 1), (1, 1), 1, (204, 200)),
            ((204, 1), (98, 1), None, (204, 208)),
            ((200, 1), (203, 1), 2, (204, 100)),  # rounded
            ((300, 1), (1, 1), 2, (204, 100)),  # no scanner has it
            ((204, 1), (0, 1), 2, (204, 100)),
            ((204, 1), (98, 0), 2, (204, 100)),
        ],
    )
    def test_of_a_tiff(self, read, across, down, unit, size, orientation):
        tags = {282: (5, across), 283: (5, down), 274: (3, [orientation]), **({296: (3, [unit])} if unit else {})}
        page = read(frame(np.full((100, 204, 1), 7, np.uint8), tags=tags))
        assert page.shape[:2] == (size[::-1] if orientation == 1 else size)
        assert (page == 7).all()

    @pytest.mark.parametrize("orientation", [1, 8])
    @pytest.mark.parametrize("kind", ["png RGB", "png P", "jpg L", "bmp L", "tif 1"])
    def test_of_other_files(self, tmp_path, kind, orientation):
        suffix, mode = kind.split()
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        how = {"exif": exif} if suffix != "bmp" else {}
        Image.new("L", (204, 100), 255).convert(mode).save(tmp_path / f"a.{suffix}", dpi=(200, 100), **how)
        page = open_image(tmp_path / f"a.{suffix}")
        turned = orientation == 8 and suffix != "bmp"
        assert page.size == page_size(tmp_path / f"a.{suffix}") == ((200, 204) if turned else (204, 200))

    def test_of_a_jpeg_without_unit(self, tmp_path):
        file = io.BytesIO()
        Image.new("L", (204, 100)).save(file, "JPEG", dpi=(200, 100))
        data = bytearray(file.getvalue())
        data[13] = 0  # its unit: aspect ratio only
        (tmp_path / "a.jpg").write_bytes(data)
        assert open_image(tmp_path / "a.jpg").size == (204, 200)

    def test_of_a_jpeg_that_is_decoded_in_part(self, tmp_path):
        fitter = ImageFitter.from_folder(TINY)
        Image.new("L", (7000, 3500), 255).save(tmp_path / "a.jpg", dpi=(200, 100))
        page, size = open_image(tmp_path / "a.jpg", fitter), page_size(tmp_path / "a.jpg", fitter)
        assert size == (7000, 7000)
        assert fitter.grid(*page.size) == fitter.grid(*size) == (55, 55)

    def test_a_stretched_page_may_not_have_too_many_pixels(self, tmp_path, monkeypatch):
        Image.new("L", (204, 100)).save(tmp_path / "a.png", dpi=(200, 100))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)
        for find in (open_image, page_size):
            with pytest.raises(ValueError, match="has more than 0 million pixels; scale it down"):
                find(tmp_path / "a.png")

    @pytest.mark.parametrize(
        ("dpi", "says"),
        [
            ((204, 98), "of 1728 × 1143 px, stored at 204 × 98 dpi, is shown as 1728 × 2379"),
            ((300, 30), "of 1728 × 1143 px, stored at 300 × 30 dpi, is shown as it is: no scanner has such pixels"),
            ((204, 204), None),
        ],
    )
    def test_validate_says_so(self, tmp_path, dpi, says):
        Image.new("1", (1728, 1143), 1).save(tmp_path / "a.tif", dpi=dpi)
        raw = json.dumps(row(0, "A", ["a.tif"])).encode()
        found = RowChecker().check(raw, 1, Source(tmp_path / "a.jsonl", tmp_path, False))
        texts = [problem.text for problem in found.problems]
        assert texts == ([f"image a.tif {says}"] if says else [])
        assert not any(problem.kind.fatal for problem in found.problems)
