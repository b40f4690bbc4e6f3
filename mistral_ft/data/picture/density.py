"""The density of pixels that a page's file states: where they are not square, the page is stretched until they are."""

import math

from PIL import Image

ROUNDED = 1.02  # densities that differ by less are the same one
MOST = 4.2  # faxes have 204 x 98 dpi, a few 408 x 98: beyond that, the file is mistaken


def square_pixels(image: Image.Image, width: int, height: int) -> tuple[tuple[int, int], str | None]:
    """The size of a page with square pixels: the side of lower density is enlarged.

    Args:
        image: its header. What the format itself states counts (TIFF, PNG, JFIF, BMP …), with or without a unit. EXIF
            in a JPEG does not: cameras and editors write 72 there for any.
        width, height: in pixels, as stored.

    Returns:
        The size, and for people what is unusual about it; None if the pixels are square.
    """
    info = image.info
    names = ("jfif_density",) if info.get("jfif_unit") == 0 else ("dpi", "aspect", "resolution")
    name = next((name for name in names if name in info), "")
    try:
        across, down = map(float, info[name])
        ratio = across / down
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # none is stated, or nothing that is one
        return (width, height), None
    stored = (
        f"{width} × {height} px, stored at {across:.4g} × {down:.4g} {'dpi' if name == 'dpi' else 'pixels per unit'},"
    )
    if not (math.isfinite(ratio) and ratio > 0 and max(ratio, 1 / ratio) > ROUNDED):
        return (width, height), None
    if max(ratio, 1 / ratio) > MOST:
        return (width, height), f"{stored} is shown as it is: no scanner has such pixels"
    size = (width, round(height * ratio)) if ratio > 1 else (round(width / ratio), height)
    return size, f"{stored} is shown as {size[0]} × {size[1]}"
