"""Images that a row carries within itself (data: URLs) or names by file: URL become files in a folder."""

import contextlib
import hashlib
import io
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from mistral_ft.data.references import decode_data_url
from mistral_ft.files import JsonObject, atomic_write

URL = re.compile(r"(data|file|https?):", re.IGNORECASE)


class ImageFolder:
    """A folder that is made when the first image comes. Files are named by their content, so no page is there twice.

    Args:
        folder: the folder; records name its images relative to the folder it lies in.

    Attributes:
        used: whether a record names an image in it.
        count: files that were written.
    """

    def __init__(self, folder: Path):
        self.folder, self.used = folder, False
        self._made_folder = False
        self._made: list[Path] = []

    @property
    def count(self) -> int:
        return len(self._made)

    def __enter__(self) -> "ImageFolder":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Remove what was written if something went wrong."""
        if kind is not None:
            self.remove_from(0)

    def remove_from(self, count: int) -> None:
        """Remove all files but the first `count` that were written, and with the last of them the folder."""
        while self.count > count:
            self._made.pop().unlink(missing_ok=True)
        if self._made_folder and not self._made:
            with contextlib.suppress(OSError):  # it is not there yet, or somebody else put something in
                self.folder.rmdir()
            self._made_folder = self.used = False

    def take(self, messages: list[JsonObject]) -> list[str]:
        """Turn the URLs of image blocks into paths of files, in place. All of a row's files are written, or none.

        Returns:
            The paths.

        Raises:
            ValueError: if an image cannot be had, or is none.
        """
        found = [
            (block, _load(block["image"]))
            for message in messages
            if isinstance(message.get("content"), list)
            for block in message["content"]
            if isinstance(block, dict) and isinstance(block.get("image"), str) and URL.match(block["image"])
        ]
        for block, (data, extension) in found:
            path = self.folder / f"{hashlib.sha256(data).hexdigest()[:32]}.{extension}"
            if not path.exists():
                if not self.folder.exists():
                    self._made_folder = True
                    self.folder.mkdir()
                with atomic_write(path, "wb") as file:
                    self._made.append(path)
                    file.write(data)
            block["image"] = f"{self.folder.name}/{path.name}"
            self.used = True
        return [block["image"] for block, _ in found]


def _load(url: str) -> tuple[bytes, str]:
    """An image's bytes and its file extension."""
    kind = url.partition(":")[0].lower()
    if kind.startswith("http"):
        raise ValueError(f"the image is on the web: download it (wget {url[:200]}) and put the file's path there")
    data = _decode(url) if kind == "data" else _read(url)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return data, str(image.format).lower()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"{url[:60]} holds no image that Pillow can open") from None


def _decode(url: str) -> bytes:
    try:
        return decode_data_url(url)
    except ValueError as error:
        raise ValueError(f"image {url[:40]}… cannot be read: {error}") from None


def _read(url: str) -> bytes:
    parts = urlsplit(url)
    path = Path(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not os.path.isfile(path):
        raise ValueError(f"image {url[:200]} does not exist")
    return path.read_bytes()
