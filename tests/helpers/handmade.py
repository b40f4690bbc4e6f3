"""TIFFs and ICC profiles written by hand: layouts that Pillow cannot save, profiles that nobody has to ship."""

import itertools
import struct
import zlib

import numpy as np

TYPES = {1: "B", 3: "H", 4: "I", 5: "I", 7: "B", 16: "Q"}


def tiff(*frames, order="<", big=False, loop_to=None) -> bytes:
    """A TIFF of frames as `frame` gives them, in "<" or ">" order; the last names the frame `loop_to` as the next."""
    word = "Q" if big else "I"
    start = struct.pack(order + "HHHQ", 43, 8, 0, 0) if big else struct.pack(order + "HI", 42, 0)
    data = bytearray((b"II" if order == "<" else b"MM") + start)
    slot, starts = len(data) - struct.calcsize(word), []

    def place(content: bytes) -> int:
        where = len(data)
        data.extend(content + b"\0" * (len(content) % 2))
        return where

    for tags, parts in frames:
        offsets = [place(part) for part in parts]
        tiled = 322 in tags
        tags = {**tags, 324 if tiled else 273: (4, offsets), 325 if tiled else 279: (4, list(map(len, parts)))}
        entries = b""
        for tag, (kind, values) in sorted(tags.items()):
            packed = struct.pack(f"{order}{len(values)}{TYPES[kind]}", *values)
            if len(packed) > struct.calcsize(word):
                packed = struct.pack(order + word, place(packed))
            count = len(values) // 2 if kind == 5 else len(values)
            entries += struct.pack(f"{order}HH{word}", tag, kind, count) + packed.ljust(struct.calcsize(word), b"\0")
        starts.append(len(data))
        struct.pack_into(order + word, data, slot, len(data))
        data += struct.pack(order + ("Q" if big else "H"), len(tags)) + entries
        slot = len(data)
        data += bytes(struct.calcsize(word))
    if loop_to is not None:
        struct.pack_into(order + word, data, slot, starts[loop_to])
    return bytes(data)


def frame(samples, photometric=1, order="<", planar=False, deflate=False, tags=()):
    """Tags and strips of a frame of samples of shape (height, width, samples), of the type that is to be stored."""
    height, width, count = samples.shape
    form = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    stored = samples.astype(samples.dtype.newbyteorder(order))
    parts = [stored[..., k].tobytes() for k in range(count)] if planar else [stored.tobytes()]
    found = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [samples.dtype.itemsize * 8] * count),
        259: (3, [8 if deflate else 1]),
        262: (3, [photometric]),
        277: (3, [count]),
        278: (4, [height]),
        284: (3, [1 + planar]),
        339: (3, [form] * count),
    }
    return found | dict(tags), [zlib.compress(part) if deflate else part for part in parts]


def profile(space: str, **tags: bytes) -> bytes:
    """An ICC profile of a colour space ("RGB ", "GRAY", "CMYK") with these tags."""
    table, content = b"", b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), 132 + 12 * len(tags) + len(content), len(data))
        content += data + bytes(-len(data) % 4)
    pcs, kind = (b"Lab ", b"prtr") if space == "CMYK" else (b"XYZ ", b"mntr")
    head = bytearray(128)
    struct.pack_into(">I", head, 0, 132 + len(table) + len(content))
    head[8:24] = b"\x02\x40\0\0" + kind + space.encode() + pcs
    head[36:40] = b"acsp"
    struct.pack_into(">iii", head, 68, *(round(value * 65536) for value in D50))
    return bytes(head) + struct.pack(">I", len(tags)) + table + content


D50 = (0.9642, 1.0, 0.8249)


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(value * 65536) for value in values))


def _curve(values) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(f">I{len(values)}H", len(values), *values)


def rgb_profile(primaries, gamma=None) -> bytes:
    """A matrix profile of red, green and blue as XYZ at D50; with the curve of sRGB unless a gamma is given."""
    levels = np.linspace(0, 1, 1024)
    curve = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    trc = _curve([round(gamma * 256)]) if gamma else _curve((curve * 65535).round().astype(int).tolist())
    red, green, blue = map(_xyz, primaries)
    return profile("RGB ", wtpt=_xyz(D50), rXYZ=red, gXYZ=green, bXYZ=blue, rTRC=trc, gTRC=trc, bTRC=trc)


def grey_profile(gamma: float) -> bytes:
    return profile("GRAY", wtpt=_xyz(D50), kTRC=_curve([round(gamma * 256)]))


def cmyk_profile(colour) -> bytes:
    """A profile of CMYK that is linear between its corners: `colour` gives the Lab of each, of inks that are 0 or 1."""
    identity = bytes(range(256))
    corners = b""
    for inks in itertools.product((0, 1), repeat=4):
        lightness, a, b = colour(*inks)
        corners += bytes([round(lightness * 2.55), a + 128, b + 128])
    matrix = struct.pack(">9i", *(65536 * (k % 4 == 0) for k in range(9)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + corners + identity * 3
    return profile("CMYK", wtpt=_xyz(D50), A2B0=table)


SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
ADOBE_RGB = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
DISPLAY_P3 = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]
