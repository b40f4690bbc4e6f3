"""Pages: the one place where an image reference (see `references.py`) becomes a picture, upright and in RGB.

Files and data URLs are read by Pillow, PDFs by PDFium (`pdf.py`). Train, predict, validate and the review page all come
here, so that they see the same page.
"""

import contextlib
import functools
import hashlib
import io
import math
import os
import warnings
from collections.abc import Iterator
from typing import IO

from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from mistral_ft.data.foreign.file_kinds import HEAD, what_else
from mistral_ft.data.foreign.paths import real_path, similar_path
from mistral_ft.data.image_fitter import ImageFitter
from mistral_ft.data.picture import heic, pdf, tiff
from mistral_ft.data.picture.colours import to_rgb
from mistral_ft.data.picture.density import square_pixels
from mistral_ft.data.references import decode_data_url, is_data_url, split_page, table_of
from mistral_ft.errors import UserError
from mistral_ft.files import sha256_file

# A JPEG is decoded at a half, quarter or eighth of its size if that is at least twice the size it is fed at, as in
# Pillow's Image.thumbnail. Scans at 600 dpi come out 0.1 to 0.7 of 255 grey levels apart from those decoded in full.
REDUCING_GAP = 2
# The environment reaches every worker process, however it is started.
MAX_PIXELS = "MISTRAL_FT_MAX_IMAGE_PIXELS"


def limit_pages(most_pixels: int | None, pdf_seconds: float | None) -> None:
    """Set the pixels that an image may have and the seconds that a page of a PDF may take; None changes nothing.

    They hold here and in worker processes yet to be started.

    Raises:
        UserError: if one is not positive.
    """
    if pdf_seconds is not None:
        if not 0 < pdf_seconds < math.inf:
            raise UserError(f"--pdf_seconds {pdf_seconds}: must be more than 0")
        os.environ[pdf.SECONDS] = str(pdf_seconds)
    if most_pixels is not None:
        if most_pixels < 1:
            raise UserError(f"--max_image_pixels {most_pixels}: must be at least 1")
        os.environ[MAX_PIXELS] = str(most_pixels)
    if MAX_PIXELS in os.environ:
        # Pillow refuses what has twice as many. Rounded, an odd limit would be another one.
        Image.MAX_IMAGE_PIXELS = int(os.environ[MAX_PIXELS]) / 2  # type: ignore[assignment]


limit_pages(None, None)
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of half the limit on


def open_image(reference: str | os.PathLike, fitter: ImageFitter | None = None) -> Image.Image:
    """Open, decode and turn upright one page, as RGB. Transparency becomes white paper.

    Args:
        reference: of one page; a path that may stand anywhere (see `references.resolve`).
        fitter: of the model that is to see the page: PDF pages are drawn as large as it is fed them, large JPEG
            scans are decoded in part and given as they are fed. `fitter.grid` is the same for these as for the whole.

    Raises:
        ValueError: why it cannot be opened, in one line.
    """
    with opened(reference) as (document, page):
        return document.image(_one_page(document, page), fitter)


def page_size(reference: str | os.PathLike, fitter: ImageFitter | None = None) -> tuple[int, int]:
    """The (width, height) in pixels of a page, upright, from the file's header; of a PDF's page as it is drawn.

    `fitter.grid` gives the same for it as for the size of what `open_image` gives.

    Raises:
        ValueError: why it cannot be opened, in one line.
    """
    with opened(reference) as (document, page):
        return document.size(_one_page(document, page), fitter)


def page_sizes(reference: str | os.PathLike, most: int) -> list[tuple[int, int]]:
    """`page_size` of the page that a reference names, or of a file's first `most` pages if it names none."""
    with opened(reference) as (document, page):
        pages = range(min(document.count, most)) if page is None else [_one_page(document, page)]
        return [document.size(page) for page in pages]


def fingerprint(reference: str) -> str:
    """SHA-256 of a page, in hexadecimal: the same for the same bytes under any name, and another for another page.

    Raises:
        ValueError: if it is a damaged data URL or not in its table; OSError: if the file cannot be read.
    """
    name, page = split_page(reference)
    if is_data_url(name) or table_of(name):
        with bytes_of(name) as file:
            digest = hashlib.sha256(file.read()).hexdigest()
    else:
        digest = _file_hash(real_path(name))
    return hashlib.sha256(f"{digest} {page}".encode()).hexdigest() if page else digest


_file_hash = functools.lru_cache(64)(sha256_file)  # a PDF has many pages


@contextlib.contextmanager
def opened(reference: str | os.PathLike) -> Iterator[tuple["PillowFile | pdf.PdfFile", int | None]]:
    """Open what a reference names, no more than its header read; what goes wrong becomes one line.

    Yields:
        The document and the page that the reference names, counted from 0; None if it names none.

    Raises:
        ValueError: why it cannot be opened.
    """
    reference = str(reference)
    name, page = split_page(reference)
    most = 40 if is_data_url(name) else 300
    shown = reference if len(name) <= most else f"{name[:most]}…{reference[len(name) :]}"
    try:
        with bytes_of(name) as file:
            if _is_pdf(file):
                is_file = not is_data_url(name) and not table_of(name)
                with pdf.PdfFile.opened(real_path(name) if is_file else file.read()) as document:
                    yield document, page
            else:
                with PillowFile.opened(file) as document:
                    yield document, page
    except FileNotFoundError:
        there = similar_path(name)
        raise ValueError(f"image {shown} does not exist{f'; there is {there}' if there else ''}") from None
    except Image.DecompressionBombError:
        limit = int(2 * (Image.MAX_IMAGE_PIXELS or 0) / 10**6)
        raise ValueError(
            f"image {shown} has more than {limit} million pixels; scale it down, or raise --max_image_pixels"
        ) from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"image {shown} {_no_image(name)}") from None
    except Exception as error:  # a damaged file makes Pillow's readers raise anything, RuntimeError and IndexError too
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or repr(error)
        raise ValueError(f"image {shown} cannot be opened: {reason}") from None


def _no_image(name: str) -> str:
    """Why a file is none that Pillow or PDFium reads."""
    with bytes_of(name) as file:
        head = file.read(HEAD)
    if found := what_else(head, name, rows=False):
        return found
    return f"cannot be opened: no PDF, and no image format that Pillow knows{'' if head else ': it is empty, 0 bytes'}"


def bytes_of(name: str) -> IO[bytes]:
    """The bytes of a path, data URL or place in a table, to read; raises ValueError or OSError if there are none."""
    if is_data_url(name):
        return io.BytesIO(decode_data_url(name))
    if table_of(name):
        from mistral_ft.data.tables import open_image_bytes  # imports datasets, which takes a second

        return open_image_bytes(name)
    name = real_path(name)
    if os.path.isdir(name):
        raise ValueError("it is no file but a folder; name an image in it")
    if os.path.exists(name) and not os.path.isfile(name):
        raise ValueError("it is no file")  # but a pipe, say, that would be waited for
    # Given a path, Pillow maps an uncompressed file into memory, and scrambles a TIFF that is stored sideways.
    return open(name, "rb")


def _is_pdf(file: IO[bytes]) -> bool:
    """Whether a file is a PDF: mail and web servers put bytes before its header, which readers of PDFs look past."""
    head = file.read(1024)
    found = head.startswith(b"%PDF-")
    if not found and b"%PDF-" in head:
        file.seek(0)
        try:
            Image.open(file)
        except Image.UnidentifiedImageError:
            found = True  # and no picture that has the word in its notes
    file.seek(0)
    return found


def _one_page(document: "PillowFile | pdf.PdfFile", page: int | None) -> int:
    """The page to open: the one that is named, or the only one."""
    if page is None and document.count > 1:
        count = document.count
        raise ValueError(f"it has {count} pages: add #page=1 to the path for one, or #page=1-{count} for all of them")
    if (page or 0) >= document.count:
        raise ValueError(f"it has no page {(page or 0) + 1}, the last is {document.count}")
    return page or 0


class PillowFile:
    """A file that Pillow reads: one page, or those of a TIFF. Of a GIF or MPO only the first frame is a page."""

    def __init__(self, file: IO[bytes]):
        start = file.read(64)
        file.seek(0)
        self._file = file
        self._tiff_pages = tiff.find_pages(file) if tiff.is_tiff(start[:4]) else []
        self.count = len(self._tiff_pages) or 1
        self.header: Image.Image  # of a TIFF, that of the page whose size or image was asked for last
        if not self._tiff_pages:
            self.header = heic.open_heic(file) if heic.is_heic(start) else Image.open(file)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, file: IO[bytes]) -> Iterator["PillowFile"]:
        yield cls(file)

    def size(self, page: int, fitter: ImageFitter | None = None) -> tuple[int, int]:
        return self._turn_to(page)[0]

    def image(self, page: int, fitter: ImageFitter | None) -> Image.Image:
        """The page; `info["density"]` says for people what is unusual about the shape of its pixels, if anything is."""
        size, unusual = self._turn_to(page)
        image = self._reduced(size, fitter) if fitter and self.header.format in ("JPEG", "MPO") else None
        whole = image is None
        if image is None and isinstance(self.header, TiffImageFile):
            image = tiff.decode(self.header)
        elif image is None:
            self.header.load()
            image = self.header
        # Cameras and scanners store pages sideways with a note how to turn them; the user sees them upright.
        ImageOps.exif_transpose(image, in_place=True)  # a copy of each page would take as long as reading it
        image = to_rgb(image)
        if whole and image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        if unusual:
            image.info["density"] = unusual
        return image

    def _turn_to(self, page: int) -> tuple[tuple[int, int], str | None]:
        """Read the header of a page; returns its size, upright and with square pixels, and what is unusual in those."""
        if self._tiff_pages:
            self.header = tiff.open_page(self._file, self._tiff_pages[page])
        stored = tiff.stored_size(self.header) if isinstance(self.header, TiffImageFile) else self.header.size
        (width, height), unusual = square_pixels(self.header, *stored)
        most = Image.MAX_IMAGE_PIXELS
        if most and width * height > 2 * most and (width, height) != stored:
            raise Image.DecompressionBombError
        return self._turned(width, height), unusual

    @property
    def orientation(self) -> int:
        """How the page is stored, as EXIF counts it; 1 is upright."""
        return self.header.getexif().get(ExifTags.Base.Orientation, 1)

    @property
    def _sideways(self) -> bool:
        return self.orientation in (5, 6, 7, 8)

    def _reduced(self, size: tuple[int, int], fitter: ImageFitter) -> Image.Image | None:
        """A JPEG of `size` at the size it is fed at, decoded in part; None if it is too small for that."""
        width, height = self.header.size
        try:
            rows, columns = fitter.grid(*size)
        except ValueError:  # too thin for the model, as it will find out
            return None
        upright = columns * fitter.cell_size, rows * fitter.cell_size
        fed = self._turned(*upright)
        ratio = min(width / fed[0], height / fed[1])
        part = next((part for part in (8, 4, 2) if ratio >= REDUCING_GAP * part), None)
        if part is None or fitter.grid(*upright) != (rows, columns):
            return None
        self.header.draft(None, (width // part, height // part))
        # The last column and row may stand for less than a pixel: without the box, print would be shifted.
        return self.header.resize(fed, fitter.resample, (0, 0, width / part, height / part))

    def _turned(self, width: int, height: int) -> tuple[int, int]:
        return (height, width) if self._sideways else (width, height)
