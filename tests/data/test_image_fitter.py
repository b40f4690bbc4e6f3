"""Pages become the numbers that transformers' own Pixtral image processor makes of them."""

import os
import random

import numpy as np
import pytest
from PIL import ExifTags, Image
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from mistral_ft.data.image_fitter import ImageFitter
from mistral_ft.data.pages import open_image, page_size
from mistral_ft.data.picture.colours import to_rgb
from mistral_ft.errors import UserError
from tests.conftest import TINY


@pytest.fixture(scope="module")
def fitter():
    return ImageFitter.from_folder(TINY)


def noise(size, seed=0) -> Image.Image:
    """Smooth noise, so that resizing has something to do."""
    values = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BILINEAR)


@pytest.mark.parametrize("size", [(28, 28), (29, 57), (300, 200), (1190, 1540), (1541, 1000), (2550, 3300), (90, 4000)])
def test_numbers_equal_those_of_transformers(fitter, size):
    page = noise(size)
    processor = PixtralImageProcessorPil(size={"longest_edge": 1540}, patch_size={"height": 28, "width": 28})
    reference = processor(page, return_tensors="np")
    pixels = fitter.pixels(page)
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, *reference["image_sizes"][0])
    np.testing.assert_allclose(pixels, reference["pixel_values"][0], atol=1e-3)


def test_grids_equal_those_of_transformers_for_random_sizes(fitter):
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

    rng = random.Random(0)
    for _ in range(2000):
        width, height = rng.randint(1, 5000), rng.randint(1, 5000)
        if max(width, height) / min(width, height) > 500:
            continue
        blank = np.empty((3, height, width), bool)
        rows, columns = get_resize_output_image_size(blank, (1540, 1540), (28, 28))
        assert fitter.grid(width, height) == (rows // 28, columns // 28)


def test_literal_grids(fitter):
    assert fitter.grid(1190, 1540) == (55, 43)  # fed as 1204 x 1540
    assert fitter.grid(1, 1) == (1, 1)
    assert fitter.grid(3080, 1540) == (28, 55)


def test_a_page_too_thin_is_refused(fitter):
    with pytest.raises(ValueError, match="too thin: fitted into 1540 px it has no pixel left"):
        fitter.grid(6000, 3)


WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def rgba(alpha: int) -> Image.Image:
    return Image.new("RGBA", (2, 2), (0, 0, 0, alpha))


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("1", (2, 2), 1), WHITE),
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("LA", (2, 2), (0, 0)), WHITE),
        (rgba(0), WHITE),
        (rgba(255), BLACK),
        (rgba(51), (204, 204, 204)),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 0)), WHITE),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 255)), BLACK),
        (Image.new("YCbCr", (2, 2), (255, 128, 128)), WHITE),
        (Image.fromarray(np.full((2, 2), 65535, np.uint16)), WHITE),
        (Image.fromarray(np.full((2, 2), 256, np.uint16)), (1, 1, 1)),
        (Image.fromarray(np.full((2, 2), 65535, np.int32)), WHITE),
        (Image.fromarray(np.full((2, 2), 1, np.float32)), WHITE),
        (Image.fromarray(np.full((2, 2), 255, np.float32)), WHITE),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), BLACK),
    ],
)
def test_every_mode_becomes_rgb(image, pixel):
    page = to_rgb(image)
    assert page.mode == "RGB"
    assert page.getpixel((1, 1)) == pixel


def test_a_palette_with_a_transparent_entry_becomes_white(tmp_path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.save(tmp_path / "a.png", transparency=1)
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("mode", ["1", "L", "RGB", "CMYK", "I;16"])
def test_a_sideways_tiff_is_turned_upright(tmp_path, mode, compression):
    dark = np.zeros((20, 30), bool)
    dark[:5, :10] = True
    stored = Image.fromarray(np.where(dark, 0, 65535).astype(np.uint16) if mode == "I;16" else ~dark)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # stored turned to the left
    stored.convert(mode).save(tmp_path / "a.tif", exif=exif, compression=compression)
    page = open_image(tmp_path / "a.tif")
    assert page.size == page_size(tmp_path / "a.tif") == (20, 30)
    assert np.array_equal(np.asarray(page)[..., 0] < 128, np.rot90(dark, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pages_are_turned_upright(tmp_path, orientation):
    image = noise((30, 20))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    page = open_image(tmp_path / "a.png")
    assert page.size == page_size(tmp_path / "a.png") == ((30, 20) if orientation < 5 else (20, 30))
    if orientation == 6:
        assert page.getpixel((0, 0)) == image.getpixel((0, 19))


def test_what_cannot_be_opened_is_named(tmp_path):
    noise((300, 300)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in [
        ("none.png", "does not exist"),
        ("folder.png", "cannot be opened: it is no file"),
        ("pipe.png", "cannot be opened: it is no file"),
        ("n" * 300 + ".png", "cannot be opened: File name too long"),
        ("text.png", "cannot be opened: no PDF, and no image format that Pillow knows"),
        ("half.png", "cannot be opened: .*truncated"),
    ]:
        for read in (open_image, page_size) if name != "half.png" else (open_image,):
            with pytest.raises(ValueError, match=f"image .*{name[:100]}.* {reason}"):
                read(tmp_path / name)


def test_a_page_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    noise((300, 300)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"large.png has more than 0 million pixels; scale it down"):
        open_image(tmp_path / "large.png")


def test_settings_that_are_not_supported_are_refused(tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    path = tmp_path / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"do_normalize": true', '"do_normalize": false'))
    with pytest.raises(UserError, match="do_normalize is off"):
        ImageFitter.from_folder(tmp_path)
    for broken in ("{}", "[1]", "{", '{"size": {"longest_edge": 0}, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"preprocessor_config.json: broken"):
            ImageFitter.from_folder(tmp_path)
