"""TIFFs: which of their frames are pages, and what the numbers of a page mean where Pillow does not say."""

import io
import struct
import sys
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from mistral_ft.data.picture.colours import to_grey

MOST_FRAMES = 100_000  # that are looked for in a file
SUBFILE, OLD_SUBFILE, BITS, PHOTOMETRIC, SAMPLES, SUBIFDS, EXTRA, FORM = 254, 255, 258, 262, 277, 330, 338, 339  # tags
THUMBNAIL, MASK, OLD_THUMBNAIL = 1, 4, 2  # bits of SUBFILE, value of OLD_SUBFILE
SIGNED, FLOAT = 2, 3  # values of FORM

# Pillow's own reader of what is not compressed makes noise of 16-bit planes and of subsampled YCbCr; libtiff does not.
TiffImagePlugin.READ_LIBTIFF = True


def is_tiff(start: bytes) -> bool:
    """Whether a file that starts with these 4 bytes is a TIFF."""
    return start in TiffImagePlugin.PREFIXES


def find_pages(file: IO[bytes]) -> list[int]:
    """Where the directories of a TIFF's pages stand in it, one to a page. Thumbnails and masks are no pages.

    Only the directories are read: Pillow would read what they refer to as well, and each of them twice.

    Raises:
        ValueError: if it is damaged, or holds a preview of a page that it does not show.
    """
    found = list(_directories(file))
    pages = [start for start, tags in found if not _is_part(tags)]
    if not pages and any(SUBIFDS in tags for _, tags in found):
        raise ValueError("it shows a preview only, as a camera's raw file does: save its page as JPEG or PNG")
    return pages or [start for start, _ in found]  # what calls itself a thumbnail of nothing is the page


def _is_part(tags: dict[int, int]) -> bool:
    return bool(tags.get(SUBFILE, 0) & (THUMBNAIL | MASK)) or tags.get(OLD_SUBFILE) == OLD_THUMBNAIL


def _directories(file: IO[bytes]) -> Iterator[tuple[int, dict[int, int]]]:
    """Where each directory stands, and its tags with the first value of those that hold it themselves."""
    left = file.seek(0, io.SEEK_END)  # bytes that directories may have: those of a whole file do not overlap
    file.seek(0)
    header = file.read(16)
    order, big = ("<" if header[:2] == b"II" else ">"), header[2] == 43
    count_of, entry, next_of = (
        struct.Struct(order + part) for part in (("Q", "HHQHH4x", "Q") if big else ("H", "HHIHH", "I"))
    )
    (start,) = next_of.unpack_from(header, 8 if big else 4)
    seen: set[int] = set()
    while start and start not in seen:  # one that comes back to an earlier directory is at its end
        seen.add(start)
        try:
            file.seek(start)
            (count,) = count_of.unpack(file.read(count_of.size))
            left -= count * entry.size
            if not count or left < 0 or len(seen) > MOST_FRAMES:
                raise ValueError
            tags = {
                tag: low if order == "<" or kind == 3 else high
                for tag, kind, _, low, high in entry.iter_unpack(file.read(count * entry.size))
            }
            here, (start,) = start, next_of.unpack(file.read(next_of.size))
        except (struct.error, ValueError, OverflowError):
            raise ValueError(
                f"the TIFF is damaged: its frame {len(seen)} cannot be found; is the file cut off?"
            ) from None
        yield here, tags


class _FromPage:
    """A TIFF that begins with one of its pages: to come to the last of a thousand, Pillow would read all of them."""

    def __init__(self, file: IO[bytes], page: int):
        self._file = file
        file.seek(0)
        header = bytearray(file.read(16))
        order = "<" if header[:2] == b"II" else ">"
        self.length = 16 if header[2] == 43 else 8
        struct.pack_into(order + ("Q" if self.length == 16 else "I"), header, self.length // 2, page)
        self.header = bytes(header[: self.length])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        data = self._file.read(size)
        return self.header[start : start + len(data)] + data[max(0, self.length - start) :]


def open_page(file: IO[bytes], page: int) -> TiffImagePlugin.TiffImageFile:
    """The header of the page whose directory stands at `page`; raises ValueError if Pillow does not read such pages."""
    source: Any = _FromPage(file, page)
    try:
        header: Any = Image.open(source, formats=("TIFF",))
        tags = header.tag_v2
        # Of planes, Pillow takes the first for grey and alpha, and no more than three for RGB unless a tag says so.
        planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
        if not planes or header.mode not in ("LA", "La", "PA", "RGBA") or (header.mode == "RGBA" and EXTRA in tags):
            return header
    except Image.UnidentifiedImageError:
        tags = TiffImagePlugin.ImageFileDirectory_v2(source.header)
        source.seek(page)
        tags.load(source)
    samples, form = tags.get(SAMPLES, 1), {SIGNED: "signed ", FLOAT: "float "}.get(tags.get(FORM, (1,))[0], "")
    compression = TiffImagePlugin.COMPRESSION_INFO.get(packing := tags.get(TiffImagePlugin.COMPRESSION, 1), packing)
    raise ValueError(
        f"Pillow does not read a TIFF with {samples} {form}samples of {tags.get(BITS, (1,))[0]} bits "
        f"(photometric {tags.get(PHOTOMETRIC)}, compression {compression}); save it as 8-bit PNG or TIFF"
    )


def stored_size(header: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    """The (width, height) of a page as it is stored; its `size` is upright, unless only XMP says how to turn it."""
    return header.tag_v2[TiffImagePlugin.IMAGEWIDTH], header.tag_v2[TiffImagePlugin.IMAGELENGTH]


def decode(header: TiffImagePlugin.TiffImageFile) -> Image.Image:
    """A page, upright, as its tags mean it: Pillow gives samples that are no bytes as bare numbers.

    Raises:
        ValueError: if it is damaged.
    """
    tags, image = header.tag_v2, header
    try:
        image.load()
    except OSError as error:
        raise ValueError(f"the TIFF is damaged or cut off ({error})") from None
    bits, form = tags.get(BITS, (1,))[0], tags.get(FORM, (1,))[0]
    if image.mode == "L" and form == SIGNED:
        return image.point([value ^ 128 for value in range(256)])
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if bits == 12:
        values = values << 4 | values >> 8
    else:
        values = values.astype(f"{ {SIGNED: 'i', FLOAT: 'f'}.get(form, 'u') }{bits // 8}")
        # libtiff gives the machine's order of bytes; Pillow knows that of unsigned 16 bits only.
        if image.mode in ("I", "F") and (tags.prefix == b"MM") == (sys.byteorder == "little"):
            values = values.byteswap()
    grey = to_grey(values)
    grey.info = image.info
    return ImageOps.invert(grey) if tags.get(PHOTOMETRIC) == 0 else grey
