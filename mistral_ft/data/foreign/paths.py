"""Files whose name differs from what a record writes only in spelling: found where nothing else can be meant, or named.

Read are composed and decomposed accents (macOS writes the latter) and Windows' backslashes. Capitals, spaces at the end
and percent signs are only named, as another file system may have both.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from unicodedata import normalize
from urllib.parse import unquote


def real_path(path: str) -> str:
    """The path of the file that a record means; as it is if there is none, or several that fit."""
    if os.path.exists(path):
        return path
    return _find(path, _composed) or path


def similar_path(path: str) -> str | None:
    """A file that is there where `real_path` finds none, under a name of other capitals, blanks or percent signs."""
    return _find(path, _folded)


def _composed(name: str) -> str:
    return normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(unquote(name)).strip().casefold()


def _find(path: str, key: Callable[[str], str]) -> str | None:
    """The one path whose parts have the same keys, a part that is there as it is before all others."""
    found = os.sep if path.startswith(("/", "\\")) else ""
    for part in filter(None, path.replace("\\", "/").split("/")):
        there = os.path.join(found, part)
        if not os.path.lexists(there):
            try:
                names = _names(found or ".", os.stat(found or ".").st_mtime_ns, key)[key(part)]
            except OSError:
                return None
            if len(names) != 1:
                return None
            there = os.path.join(found, names[0])
        found = there
    return found if os.path.isfile(found) else None


@lru_cache(16)
def _names(folder: str, changed: int, key: Callable[[str], str]) -> defaultdict[str, list[str]]:
    """The names in a folder by their keys; read again when it has changed."""
    names = defaultdict(list)
    for name in os.listdir(folder):
        names[key(name)].append(name)
    return names
