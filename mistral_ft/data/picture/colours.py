"""Colours: from any mode and colour space to sRGB, on white paper."""

import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# The highest values that samples of a kind use for white; which one is theirs, files do not say.
WHITES = {"u4": (255, 65535, 2**32 - 1), "i2": (255, 32767), "i4": (255, 65535, 2**31 - 1), "f": (1, 255, 65535)}
OVERSHOOT = 1.5  # of floats, in parts of white: what was resized or sharpened goes beyond it, and below black
SPACES = {"L": "GRAY", "RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}  # of the profiles that fit a mode
SAME = 2  # levels of 255: a profile that moves no colour by more is sRGB, under whichever of its names


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB: by its ICC profile to sRGB, alpha on white, more than 8 bits scaled instead of clipped.

    A profile that is damaged, or made for other modes, says nothing about the page's colours and is left out.
    """
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        values, clear = np.asarray(image), image.info.get("transparency")
        image = to_grey(values if clear is None else np.where(values == clear, 65535, values).astype(values.dtype))
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.mode == "LAB":
        image = _to_srgb(ImageCms.createProfile("LAB"), "LAB").apply(image)
    elif profile:
        image = _by_profile(image, profile)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    image = image.convert("RGB")
    image.info.pop("icc_profile", None)  # saved with the page, it would be applied again
    return image


def to_grey(values: np.ndarray) -> Image.Image:
    """Samples of 16 bits or more as a grey page of 8: shape (height, width), of integers or floats.

    Unsigned 16 bits are 0 to 65535. For others white is the usual value that the brightest one comes near to, or that
    one itself; black is 0, or as far below it as white is above where there are values below.
    """
    kind, size = values.dtype.kind, values.dtype.itemsize
    values = values.astype(np.float64)
    black, white = 0.0, 65535.0
    if (kind, size) != ("u", 2):
        values = np.nan_to_num(values, posinf=np.inf, neginf=-np.inf)
        finite = values[np.isfinite(values)]
        low, high = finite.min(initial=0), finite.max(initial=0)
        below = low < (-high / 10 if kind == "f" else 0)
        high = max(high, -low) if below else high
        usual = WHITES.get(kind if kind == "f" else f"{kind}{size}", ())
        most = OVERSHOOT if kind == "f" else 1
        white = next((value for value in usual if value / 4 <= high <= value * most), float(high) or 1.0)
        black = -white if below else 0.0
    scaled = (values.clip(black, white) - black) * (255 / (white - black))
    return Image.fromarray(scaled.round().astype(np.uint8))


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """A page in sRGB; as it is if its profile is sRGB, damaged, or one of another colour space."""
    alpha = image.has_transparency_data
    mode = {"LA": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB"}.get(image.mode, image.mode)
    change = _change(profile, "RGBA" if alpha and mode == "RGB" else mode)
    if change is None:
        return image
    if isinstance(change, list):
        return image.convert("LA").point(change + list(range(256))) if alpha else image.point(change)
    if image.mode not in ("RGB", "CMYK") or alpha:
        image = image.convert("RGBA" if alpha else "RGB")
    return change.apply(image)


@functools.lru_cache(16)  # pages of one source have the same profile
def _change(profile: bytes, mode: str) -> "ImageCms.ImageCmsTransform | list[int] | None":
    """What turns a page into sRGB: of grey ones the level that each becomes; None if the page is to stay as it is."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode not in SPACES or source.profile.xcolor_space.strip() != SPACES[mode]:
            return None
        transform = _to_srgb(source, mode)
        if mode == "CMYK":
            before = Image.new("CMYK", (1, 1))
        elif mode == "L":
            before = Image.frombytes("L", (256, 1), bytes(range(256)))
        else:
            levels = np.linspace(0, 255, 18).astype(np.uint8)
            colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(1, -1, 3)
            before = Image.fromarray(colours).convert(mode)
        after = transform.apply(before).convert("RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    apart = np.abs(np.asarray(before.convert("RGB"), int) - np.asarray(after, int))
    if (apart.max() <= SAME and mode != "CMYK") or apart[0, -1].max() > 127:  # its paper is dark: it is damaged
        return None
    return list(after.getchannel("G").tobytes()) if mode == "L" else transform


def _to_srgb(source: Any, mode: str) -> ImageCms.ImageCmsTransform:
    # Paper becomes white and the darkest ink black, as image editors do unless told otherwise.
    return ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGBA" if mode == "RGBA" else "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
