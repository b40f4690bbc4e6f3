"""Colours and formats: what a page's profile says, what is transparent, and photographs of phones."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from mistral_ft.data.image_fitter import ImageFitter
from mistral_ft.data.pages import open_image, page_size
from mistral_ft.data.picture.colours import to_rgb
from mistral_ft.review.page_files import render_page
from tests.conftest import TINY
from tests.helpers.handmade import ADOBE_RGB, DISPLAY_P3, SRGB, cmyk_profile, grey_profile, rgb_profile

ADOBE, P3, PLAIN = rgb_profile(ADOBE_RGB, 2.2), rgb_profile(DISPLAY_P3), rgb_profile(SRGB)
DARK_INK = cmyk_profile(lambda c, m, y, k: (max(0, 100 - 30 * c - 35 * m - 8 * y - 75 * k), 0, 0))


def of_one_colour(mode: str, colour, profile: bytes) -> Image.Image:
    image = Image.new(mode, (40, 30), colour)
    image.info["icc_profile"] = profile
    return image


def near(found, expected) -> bool:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 2


class TestProfiles:
    @pytest.mark.parametrize(
        ("mode", "colour", "profile", "expected"),
        [
            ("RGB", (200, 100, 50), ADOBE, (227, 100, 42)),
            ("RGB", (200, 100, 50), P3, (215, 93, 31)),
            ("RGB", (255, 255, 255), ADOBE, (255, 255, 255)),
            ("RGB", (0, 0, 0), P3, (0, 0, 0)),
            ("RGBA", (200, 100, 50, 255), ADOBE, (227, 100, 42)),
            ("RGBA", (200, 100, 50, 0), ADOBE, (255, 255, 255)),
            ("RGBA", (0, 0, 0, 128), ADOBE, (127, 127, 127)),
            ("L", 128, grey_profile(1.8), (146, 146, 146)),
            ("LA", (128, 255), grey_profile(1.8), (146, 146, 146)),
            ("LA", (128, 0), grey_profile(1.8), (255, 255, 255)),
            ("I;16", 128 * 257, grey_profile(1.8), (146, 146, 146)),
            ("CMYK", (0, 0, 0, 0), DARK_INK, (255, 255, 255)),
            ("CMYK", (255, 0, 0, 0), DARK_INK, (171, 171, 171)),
            ("CMYK", (0, 0, 0, 255), DARK_INK, (60, 60, 60)),
        ],
    )
    def test_become_srgb(self, mode, colour, profile, expected):
        page = to_rgb(of_one_colour(mode, colour, profile))
        assert near(page.getpixel((0, 0)), expected)
        assert "icc_profile" not in page.info  # or it would be applied again to a copy that is saved

    @pytest.mark.parametrize("transparent", [False, True])
    def test_of_a_palette(self, tmp_path, transparent):
        image = Image.new("P", (4, 4), 0)
        image.putpalette([200, 100, 50, 0, 0, 0])
        image.putpixel((0, 0), 1)
        image.save(tmp_path / "a.png", icc_profile=ADOBE, **({"transparency": 1} if transparent else {}))
        page = open_image(tmp_path / "a.png")
        assert near(page.getpixel((2, 2)), (227, 100, 42))
        assert page.getpixel((0, 0)) == ((255,) * 3 if transparent else (0,) * 3)

    def test_srgb_under_any_name_changes_no_pixel(self):
        noise = np.random.default_rng(0).integers(0, 256, (50, 60, 4), np.uint8)
        for mode in ("RGB", "RGBA", "P"):
            image = Image.fromarray(noise).convert(mode)
            without = to_rgb(image).tobytes()
            image.info["icc_profile"] = PLAIN
            assert to_rgb(image).tobytes() == without

    @pytest.mark.parametrize(
        ("mode", "colour", "profile"),
        [
            ("RGB", (1, 2, 3), b"damaged"),
            ("RGB", (1, 2, 3), ADOBE[:200]),
            ("RGB", (1, 2, 3), ADOBE[:300]),
            ("RGB", (1, 2, 3), grey_profile(1.8)),
            ("RGB", (1, 2, 3), DARK_INK),
            ("L", 100, ADOBE),
            ("1", 255, ADOBE),
            ("CMYK", (0, 0, 0, 255), ADOBE),
            ("CMYK", (0, 0, 0, 0), cmyk_profile(lambda *inks: (10, 0, 0))),  # black paper
        ],
    )
    def test_what_is_damaged_or_does_not_fit_is_left_out(self, mode, colour, profile):
        image = of_one_colour(mode, colour, profile)
        assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()

    @pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
    def test_of_a_scan_that_is_decoded_in_part(self, tmp_path, mode):
        profile = {"RGB": ADOBE, "CMYK": DARK_INK, "L": grey_profile(1.8)}[mode]
        colour = {"RGB": (200, 100, 50), "CMYK": (255, 0, 0, 0), "L": 128}[mode]
        Image.new(mode, (7000, 4000), colour).save(tmp_path / "a.jpg", icc_profile=profile)
        fitter = ImageFitter.from_folder(TINY)
        whole, part = open_image(tmp_path / "a.jpg"), open_image(tmp_path / "a.jpg", fitter)
        assert part.width < 2000
        assert near(part.getpixel((50, 50)), whole.getpixel((50, 50)))
        assert not near(part.getpixel((50, 50)), Image.new(mode, (1, 1), colour).convert("RGB").getpixel((0, 0)))


def test_a_grey_of_16_bits_that_is_transparent_is_paper(tmp_path):
    Image.new("I;16", (4, 4), 300).save(tmp_path / "a.png", transparency=300)
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["La", "LA", "PA", "RGBa", "RGBA"])
def test_what_is_transparent_is_paper(mode):
    image = Image.new("LA", (2, 2), (200, 0)).convert("RGBA").convert({"RGBa": "RGBa", "La": "LA"}.get(mode, mode))
    image = image.convert("La") if mode == "La" else image
    assert image.mode == mode
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


class TestReviewPage:
    """A browser shows what the model sees: it stretches nothing, and has rules of its own for profiles."""

    @pytest.mark.parametrize(
        ("saved", "size", "colour"),
        [
            ({"icc_profile": ADOBE}, (40, 30), (227, 100, 42)),
            ({"dpi": (200, 100)}, (40, 60), (200, 100, 50)),
            ({"icc_profile": b"damaged"}, (40, 30), (200, 100, 50)),
        ],
    )
    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_shows_what_the_model_sees(self, tmp_path, suffix, saved, size, colour):
        Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / f"a.{suffix}", **saved)
        with Image.open(io.BytesIO(render_page(f"{tmp_path}/a.{suffix}", 0)[0])) as shown:
            assert shown.size == size
            assert near(shown.convert("RGB").getpixel((5, 5)), colour)
            assert "icc_profile" not in shown.info


class TestHeic:
    @pytest.fixture
    def photo(self, tmp_path) -> Path:
        pillow_heif = pytest.importorskip("pillow_heif")
        image = Image.new("RGB", (80, 48), "white")
        image.paste((255, 0, 0), (0, 0, 40, 24))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        pillow_heif.from_pillow(image).save(tmp_path / "a.heic", quality=90, exif=exif.tobytes())
        return tmp_path / "a.heic"

    def test_is_turned_once(self, photo):
        page = open_image(photo)
        assert page.size == page_size(photo) == (48, 80)
        assert near(page.getpixel((45, 2)), (254, 0, 0))
        assert near(page.getpixel((2, 2)), (255, 255, 255))

    def test_the_first_picture_is_the_one_that_the_file_names(self, tmp_path):
        pillow_heif = pytest.importorskip("pillow_heif")
        file = pillow_heif.HeifFile()
        for width in (80, 100):
            file.add_from_pillow(Image.new("RGB", (width, 48), "white"))
        file.save(tmp_path / "a.heic", primary_index=1)
        assert open_image(tmp_path / "a.heic").size == page_size(tmp_path / "a.heic") == (100, 48)

    def test_has_a_profile(self, photo):
        image = Image.new("RGB", (64, 64), (200, 100, 50))
        image.save(photo, icc_profile=ADOBE, quality=95, format="HEIF")
        assert near(open_image(photo).getpixel((9, 9)), (227, 100, 42))

    def test_that_is_cut_off_is_named(self, photo):
        photo.write_bytes(photo.read_bytes()[:200])
        with pytest.raises(ValueError, match="a.heic cannot be opened: the HEIC is damaged or cut off"):
            open_image(photo)

    @pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1", b"mif1\0\0\0\0miafheic", b"msf1\0\0\0\0hevc"])
    def test_without_the_package_one_line_says_so(self, tmp_path, monkeypatch, brands):
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        (tmp_path / "a.heic").write_bytes((len(brands) + 8).to_bytes(4, "big") + b"ftyp" + brands + bytes(50))
        reason = "a.heic cannot be opened: is HEIC: pip install -r requirements-heic.txt, or save as JPEG"
        for read in (open_image, page_size):
            with pytest.raises(ValueError, match=reason):
                read(tmp_path / "a.heic")

    def test_avif_is_no_heic(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        Image.new("RGB", (40, 30), "white").save(tmp_path / "a.avif")
        assert open_image(tmp_path / "a.avif").size == (40, 30)
