"""HEIC, in which phones store photographs: read by pillow-heif if it is installed."""

from typing import IO

from PIL import Image

BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}


def is_heic(start: bytes) -> bool:
    """Whether a file that starts with these bytes, 64 or all of it, is HEIC; AVIF is in the same boxes."""
    size = int.from_bytes(start[:4], "big")
    return start[4:8] == b"ftyp" and not BRANDS.isdisjoint(start[at : at + 4] for at in range(8, min(size, 64), 4))


def open_heic(file: IO[bytes]) -> Image.Image:
    """The header of HEIC, which gives the page upright; raises ValueError if it cannot be read."""
    try:
        import pillow_heif
    except ImportError:
        raise ValueError("is HEIC: pip install -r requirements-heic.txt, or save as JPEG") from None
    pillow_heif.register_heif_opener()
    try:
        return Image.open(file, formats=("HEIF",))
    except Image.UnidentifiedImageError:
        raise ValueError("the HEIC is damaged or cut off") from None
