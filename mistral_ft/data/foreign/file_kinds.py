"""What a file is whose content is not what its name says, and the command that gets what was meant."""

import os
import shlex

HEAD = 512  # bytes of a file that tell its kind
# How files begin that hold neither rows nor an image.
_KINDS = {
    b"version https://git-lfs.github.com/spec/": "is a git-LFS pointer, not the file itself: run git lfs pull",
    b"\x1f\x8b": "is compressed: gunzip -c {path} > {unpacked}",
    b"\x28\xb5\x2f\xfd": "is compressed: zstd -dc {path} > {unpacked}",
    b"BZh": "is compressed: bunzip2 -c {path} > {unpacked}",
    b"\xfd7zXZ\x00": "is compressed: unxz -c {path} > {unpacked}",
    b"PK\x03\x04": "is a zip archive: unzip {path} (if it is an Excel file, save it as CSV)",
}
_NO_ROWS = {
    b"PAR1": "is a parquet file: rename it to {stem}.parquet",
    b"%PDF-": "is a PDF; rows of a JSONL file name its pages (file.pdf#page=3)",
    b"\x89PNG": "is an image; rows of a JSONL file name it",
    b"\xff\xd8\xff": "is an image; rows of a JSONL file name it",
}
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_WEB_PAGE = (b"<!doctype html", b"<html", b"<?xml")
# Byte order marks, the longer ones first; without one, where the zero bytes of ASCII characters are.
_MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def what_else(head: bytes, path: str | os.PathLike, rows: bool = True) -> str | None:
    """What a file is that can be read neither as rows nor as an image, and what to do; None for any other.

    Args:
        head: its first `HEAD` bytes.
        rows: whether it should hold rows of text, and not an image.
    """
    name = shlex.quote(str(path))
    if len(head) > 16 and not head.strip(b"\0"):
        return "begins with nothing but NUL bytes: a download or copy that broke off; fetch it again"
    if head.lstrip().lower().startswith(_WEB_PAGE):
        return "is a web page, not the file itself: download that (on Hugging Face by /resolve/ instead of /blob/)"
    kinds = _KINDS | (_NO_ROWS if rows else {})
    if found := next((text for start, text in kinds.items() if head.startswith(start)), None):
        stem, suffix = os.path.splitext(path)
        unpacked = stem if suffix in _PACKED else f"{stem}-unpacked{suffix}"
        return found.format(path=name, stem=shlex.quote(stem), unpacked=shlex.quote(unpacked))
    if rows and (encoding := _encoding(head)):
        return f"is {encoding} text, not UTF-8: iconv -f {encoding} -t UTF-8 {name} > {shlex.quote(_beside(path))}"
    return None


def to_utf8(path: str | os.PathLike) -> str:
    """The command that mends a file whose bytes are no UTF-8, where Windows wrote it."""
    command = f"iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(_beside(path))}"
    return f"if Windows wrote it: {command}"


def _beside(path: str | os.PathLike) -> str:
    return "-utf8".join(os.path.splitext(path))


def _encoding(head: bytes) -> str | None:
    if marked := next((name for mark, name in _MARKS.items() if head.startswith(mark)), None):
        return marked
    zeros = [head[place::4].count(0) * 8 > len(head) for place in range(4)]  # at least half of every fourth byte
    kinds = {"0111": "UTF-32LE", "1110": "UTF-32BE", "0101": "UTF-16LE", "1010": "UTF-16BE"}
    return kinds.get("".join(str(int(most)) for most in zeros))
