"""Pages for the browser: only from the images' folder, only what Pillow or PDFium could read, in a format it shows."""

import io
import os
import threading
from pathlib import Path, PurePosixPath

from PIL import ExifTags, Image

from mistral_ft.images import open_image, opened

MOST_PIXELS = 25_000_000  # that are sent; larger pages are scaled down
MOST_BYTES = 20_000_000  # of a file that is sent as it is
MOST_PAGES = 500  # of one file that are shown
PDF_DPI = 200

# What every browser shows as Pillow reads it: any other format, and other modes of these, are converted.
SHOWN = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
SHOWN_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}

_pdfium = threading.Lock()  # PDFium does one thing at a time


def find_page(images_dir: str | os.PathLike, name: str) -> Path:
    """The file of a record's image.

    Raises:
        ValueError: if it would be outside of the folder, through "..", a link or an absolute path.
    """
    folder = Path(images_dir).resolve()
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not name or "\0" in name or ".." in parts or name.startswith(("/", "\\")) or Path(name).is_absolute():
        raise ValueError("image paths must be relative to the images' folder, without ..; this one is not opened")
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise ValueError("the image is a link that leads out of the images' folder; it is not opened")
        if not path.exists():
            raise ValueError(f"there is no such file in {folder}; start the server with -i and the images' folder")
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"the image cannot be opened: {reason}") from None
    return path


def page_sizes(path: Path) -> list[tuple[int, int]]:
    """(width, height) of each page of a file: pixels, upright; of a PDF at `PDF_DPI`.

    Raises:
        ValueError: why it cannot be opened, in one line.
    """
    if _is_pdf(path):
        with _pdfium, _pdf(path) as pdf:
            sizes = [pdf.get_page_size(number) for number in range(min(len(pdf), MOST_PAGES))]
        return [(round(width * PDF_DPI / 72), round(height * PDF_DPI / 72)) for width, height in sizes]
    sizes = []
    with opened(path) as image:
        frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        for number in range(min(frames, MOST_PAGES)):
            image.seek(number)
            sizes.append(image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size)
    return sizes


def render_page(path: Path, page: int) -> tuple[bytes, str]:
    """A page as (bytes, media type) for a browser: upright, with at most `MOST_PIXELS`.

    The page is decoded to its end in any case, so that what predict cannot read is not shown either.

    Raises:
        ValueError: why it cannot be opened, in one line.
    """
    if _is_pdf(path):
        image = _render_pdf(path, page)
    else:
        image = open_image(path, page)
        with opened(path) as header:
            kind = SHOWN.get(header.format) if header.mode in SHOWN_MODES and _orientation(header) == 1 else None
            kind = None if getattr(header, "n_frames", 1) > 1 else kind
        if kind and image.width * image.height <= MOST_PIXELS and path.stat().st_size <= MOST_BYTES:
            return path.read_bytes(), kind
    shrink = (MOST_PIXELS / (image.width * image.height)) ** 0.5
    if shrink < 1:
        image.thumbnail((max(1, int(image.width * shrink)), max(1, int(image.height * shrink))))
    output = io.BytesIO()
    if max(image.size) > 65_500:  # more than JPEG can have
        image.save(output, "PNG", compress_level=1)
        return output.getvalue(), "image/png"
    image.save(output, "JPEG", quality=92, subsampling=0)
    return output.getvalue(), "image/jpeg"


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _is_pdf(path: Path) -> bool:
    if not path.is_file():
        raise ValueError("it is no file")
    with open(path, "rb") as file:
        return file.read(5) == b"%PDF-"


def _pdf(path: Path):
    import pypdfium2  # not needed where there are no PDFs

    try:
        return pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"the PDF cannot be opened: {error}") from None


def _render_pdf(path: Path, page: int) -> Image.Image:
    import pypdfium2

    with _pdfium, _pdf(path) as pdf:
        try:
            width, height = pdf.get_page_size(page)
            scale = min(PDF_DPI / 72, (MOST_PIXELS / max(1, width * height)) ** 0.5)
            return pdf[page].render(scale=scale).to_pil().convert("RGB")
        except (pypdfium2.PdfiumError, IndexError) as error:
            raise ValueError(f"page {page + 1} of the PDF cannot be shown: {error}") from None
