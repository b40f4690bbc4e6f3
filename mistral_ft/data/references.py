"""Image references: what a record may write for an image.

    scan.png                        a file, its path relative to the images' folder or absolute
    file.pdf#page=3                 one page of a PDF or TIFF, counted from 1
    file.pdf#page=1-4               four images, in this order
    a.parquet#row=12&column=image   an image in a table, row counted from 0; &item=0 where the column holds lists
    data:image/png;base64,iVBORw…   the image itself

Here they are only text; `pages.py` opens them. A further kind needs its shape here and a reader in `pages.bytes_of`.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mistral_ft.files import JsonObject

MOST_PAGES = 1000  # of one range: each is an image of thousands of tokens

_MARK = "#page="
IN_TABLE = re.compile(r"(?P<table>.+)#row=(?P<row>\d+)&column=(?P<column>[^&#]+)(?:&item=(?P<item>\d+))?", re.DOTALL)
_BASE64 = {
    "iVBORw0KGgo": "png",
    "/9j/": "jpeg",
    "UklGR": "webp",
    "R0lGOD": "gif",
    "SUkq": "tiff",
    "TU0A": "tiff",
    "Qk": "bmp",
}
_RANGE = re.compile(r"([1-9][0-9]{0,6})(?:-([1-9][0-9]{0,6}))?")


def check_reference(reference: str) -> None:
    """Check an image reference's shape.

    Raises:
        ValueError: what is wrong and how to mend it, in one line.
    """
    kind = reference[:6].partition(":")[0].lower() if ":" in reference[:6] else ""
    if kind in ("http", "https"):
        raise ValueError(f"`image` is on the web: download it (wget {reference[:200]}) and write the file's path")
    if kind != "file" and re.match(r"\w+://", reference):
        raise ValueError(f"`image` is no file but an address, {reference[:200]}: download it and write the file's path")
    if kind == "file":
        path = unquote(urlsplit(reference).path)[:200]
        raise ValueError(f"`image` is a file: URL: write the path itself, {path} (reformat_data does so)")
    if len(reference) > 200 and (
        found := next((k for start, k in _BASE64.items() if reference.startswith(start)), None)
    ):
        raise ValueError(
            f"`image` is base64 without its head: write data:image/{found};base64, before {reference[:20]}…"
        )
    if kind == "data" and not re.match(r"data:[^,]*;base64,", reference[:200], re.IGNORECASE):
        raise ValueError(f"`image` is no base64 data URL (data:image/png;base64,…): {reference[:40]}")
    name, mark, numbers = reference.rpartition(_MARK)
    if mark:
        pages = _RANGE.fullmatch(numbers)
        first, last = (int(pages[1]), int(pages[2] or pages[1])) if pages else (1, 0)
        if not name or first > last:
            raise ValueError(
                f"`image` must name pages as a.pdf#page=3 or a.pdf#page=1-4 do, not {reference[-40:]!r}; "
                "a file of such a name must be renamed"
            )
        if last - first >= MOST_PAGES:
            raise ValueError(f"`image` asks for {last - first + 1:,} pages; at most {MOST_PAGES:,} make one record")


def expand_pages(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """Checked messages with one image block per page: "#page=1-4" becomes four blocks, in new messages."""
    expanded = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(_MARK in block.get("image", "") for block in content):
            blocks = []
            for block in content:
                pages = expand(block["image"]) if block["type"] == "image" else [None]
                blocks += [block | {"image": page} if page else block for page in pages]
            message = message | {"content": blocks}
        expanded.append(message)
    return expanded


def expand(reference: str) -> list[str]:
    """A checked reference as one reference per page."""
    name, mark, pages = reference.rpartition(_MARK)
    first, dash, last = pages.partition("-") if mark else ("", "", "")
    return [f"{name}{_MARK}{page}" for page in range(int(first), int(last) + 1)] if dash else [reference]


def split_page(reference: str) -> tuple[str, int | None]:
    """(Path or data URL, page counted from 0) of a reference to one page; None where it names no page."""
    name, mark, page = reference.rpartition(_MARK)
    return (name, int(page) - 1) if mark else (reference, None)


def table_of(name: str) -> str | None:
    """The table that a reference, without its page, leads into; None if it leads to a file."""
    found = None if is_data_url(name) else IN_TABLE.fullmatch(name)
    return found["table"] if found else None


def is_data_url(reference: str) -> bool:
    """Whether a reference is the image itself."""
    return reference[:5].lower() == "data:"


def resolve(reference: str, folder: Path) -> str:
    """A reference that means the same from anywhere: its path joined to the images' folder."""
    return reference if is_data_url(reference) else str(folder / reference)


def decode_data_url(url: str) -> bytes:
    """The bytes of a base64 data URL; raises ValueError if it is none."""
    head, _, text = url.partition(",")
    if not head.lower().endswith(";base64"):
        raise ValueError("it is no base64 data URL (data:image/png;base64,…)")
    try:
        return base64.b64decode(re.sub(r"\s", "", unquote(text)), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is no valid base64: is it cut off?") from None
