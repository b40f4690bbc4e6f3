"""Pages for the browser: only from the images' folder, only what Pillow or PDFium could read, in a format it shows."""

import contextlib
import io
import os
import threading
from pathlib import Path, PurePosixPath

from mistral_ft.data.pages import PillowFile, bytes_of, open_image, opened
from mistral_ft.data.references import check_reference, is_data_url, split_page, table_of

MOST_PIXELS = 25_000_000  # that are sent; larger pages are scaled down
MOST_BYTES = 20_000_000  # of a file that is sent as it is
MOST_PAGES = 500  # of one file that are shown

# What every browser shows as Pillow reads it: any other format, and other modes of these, are converted.
SHOWN = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
SHOWN_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}
COLOURS = {"icc_profile", "gamma"}  # of which browsers make what we do not, where profiles are damaged or do not fit

_decoding = threading.Semaphore(2)  # a large page takes half a GB; PDFs are drawn in processes of their own


def find_page(images_dir: str | os.PathLike, reference: str) -> str:
    """A record's image, for `pages.open_image`.

    Args:
        reference: one page at most, as a record writes it.

    Raises:
        ValueError: if it would be outside of the folder, through "..", a link or an absolute path.
    """
    check_reference(reference)
    if is_data_url(reference):
        return reference
    folder = Path(images_dir).resolve()
    whole, page = split_page(reference)
    name = table_of(whole) or whole
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
    if "#page=" in path.name or table_of(str(path)):  # a link's aim, which would be read as another file's page
        raise ValueError("the image is a link to a name with #page= or #row= in it; it is not opened")
    return f"{path}{whole[len(name) :]}" + ("" if page is None else f"#page={page + 1}")


def render_page(reference: str, page: int) -> tuple[bytes, str]:
    """A page as (bytes, media type) for a browser: upright, with at most `MOST_PIXELS`.

    The page is decoded to its end in any case, so that what predict cannot read is not shown either.

    Args:
        page: which one, from 0, if the reference names none.

    Raises:
        ValueError: why it cannot be opened, in one line.
    """
    name, named = split_page(reference)
    reference = f"{name}#page={(page if named is None else named) + 1}"
    with opened(reference) as (document, _):
        by_pillow = isinstance(document, PillowFile)
        kind = _shown_as(document) if isinstance(document, PillowFile) else None
    with _decoding if by_pillow else contextlib.nullcontext():
        image = open_image(reference)
    if kind and image.width * image.height <= MOST_PIXELS:
        with bytes_of(name) as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) <= MOST_BYTES:
            return data, kind
    shrink = (MOST_PIXELS / (image.width * image.height)) ** 0.5
    if shrink < 1:
        image.thumbnail((max(1, int(image.width * shrink)), max(1, int(image.height * shrink))))
    output = io.BytesIO()
    if max(image.size) > 65_500:  # more than JPEG can have
        image.save(output, "PNG", compress_level=1)
        return output.getvalue(), "image/png"
    image.save(output, "JPEG", quality=92, subsampling=0)
    return output.getvalue(), "image/jpeg"


def _shown_as(file: PillowFile) -> str | None:
    """The media type of a file that a browser shows as `open_image` gives it."""
    size, header = file.size(0), file.header
    as_it_is = header.mode in SHOWN_MODES and file.orientation == 1 and getattr(header, "n_frames", 1) == 1
    as_it_is &= header.size == size and COLOURS.isdisjoint(header.info)
    return SHOWN.get(header.format or "") if as_it_is else None
