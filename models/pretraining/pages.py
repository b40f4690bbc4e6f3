"""Pages of print: the visual family that the embedded base was pre-trained on and that the sample shows.

A page is laid out as a list of glyphs with places, and a batch of pages is drawn at once, on the CPU or on a GPU: that
costs next to nothing beside training. A page is a letter (letterhead, heading, body text) or a form (heading, lines
such as "Total: 1,204.50", small print).
"""

import functools
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from models.pretraining.glyphs import ENCODING, FAMILIES, GREYS, RULE, RULE_WIDTH, SIZES

CELL = 28  # pixels along the edge of one image token
MONTHS = "January February March April May June July August September October November December".split()


def reserved(text: str) -> bool:
    """Whether a title or value is kept for test pages: one in eight is; training and pre-training have none of them."""
    return zlib.crc32(text.encode()) % 8 == 0


def draw_free(make: Callable[[random.Random], str], rng: random.Random, test: bool = False) -> str:
    """The first of make(rng) that belongs to the test pages, or to the others."""
    while True:
        text = make(rng)
        if reserved(text) == test:
            return text


class Glyphs:
    """glyphs.npz: arrays of shape (fonts, 256) as `glyphs.cut` describes them, and `pixels` (all pictures in a row)."""

    def __init__(self):
        with np.load(Path(__file__).with_name("glyphs.npz")) as file:
            arrays = {name: file[name] for name in file.files}
        packed = arrays.pop("pixels")
        self.pixels = torch.from_numpy(np.stack([packed >> 4, packed & 15], 1).reshape(-1))
        self.number = {str(name): index for index, name in enumerate(arrays.pop("names"))}
        self.size = np.array([int(name.rsplit("-", 1)[1]) for name in self.number])
        self.advance = arrays["advance"].astype(np.int32)
        shapes = np.stack([arrays[name] for name in ("start", "height", "width", "left", "top")], -1)
        self.shapes = torch.from_numpy(shapes.astype(np.int32)).reshape(-1, 5)  # row: font * 256 + code
        self.on: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def tensors(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`shapes` and `pixels` on a device."""
        if device not in self.on:
            self.on[device] = (self.shapes.to(device), self.pixels.to(device))
        return self.on[device]


@functools.cache
def load_glyphs() -> Glyphs:
    """The glyphs, read once per process."""
    return Glyphs()


def font(family: str, style: str, size: int) -> int:
    """The number of a font: the nearest size not above `size`, in pixels."""
    return load_glyphs().number[f"{family}-{style}-{max(s for s in SIZES[style] if s <= size)}"]


def encode(text: str) -> np.ndarray:
    """Codes of the characters, one byte each."""
    return np.frombuffer(text.encode(ENCODING), np.uint8).astype(np.int32)


def edges(text: str, font: int) -> np.ndarray:
    """Where each character starts and the last one ends, in pixels: len(text) + 1 integers."""
    return np.concatenate([[0], np.cumsum(load_glyphs().advance[font, encode(text)])])


def wrap(text: str, font: int, width: float) -> list[str]:
    """Break a text at spaces into lines of at most `width` pixels; a word that does not fit has a line of its own."""
    at = edges(text, font)
    spaces = [i for i, c in enumerate(text) if c == " "] + [len(text)]
    lines, start, fitting = [], 0, None
    for space in spaces:
        if fitting is not None and at[space] - at[start] > width:
            lines.append(text[start:fitting])
            start = fitting + 1
        fitting = space
    return [*lines, text[start:]]


@dataclass
class Line:
    """A printed line that can be asked for: its text, where its pen starts (x, base line y, in pixels), its font."""

    text: str
    x: int
    y: int
    font: int


@dataclass
class Page:
    """A page in the making.

    Attributes:
        size: (width, height) in pixels.
        glyphs: arrays of shape (n, 3): font * 256 + code, x, y of the pen.
        parts: the lines of each part that can be asked for, such as "heading" or "value of Total".
        keys: the printed names of a form's values.
    """

    size: tuple[int, int]
    glyphs: list[np.ndarray] = field(default_factory=list)
    parts: dict[str, list[Line]] = field(default_factory=dict)
    keys: list[Line] = field(default_factory=list)

    def print(self, text: str, x: float, y: float, font: int) -> Line:
        """Put a line on the page."""
        codes = encode(text)
        advance = load_glyphs().advance[font, codes]
        placed = np.empty((len(codes), 3), np.int32)
        placed[:, 0] = font * 256 + codes
        placed[:, 1] = int(x) + np.cumsum(advance) - advance
        placed[:, 2] = int(y)
        self.glyphs.append(placed)
        return Line(text, int(x), int(y), font)

    def rule(self, x: int, y: int, width: int) -> None:
        """Put a ruled line on the page, one pixel thick."""
        starts = np.arange(x, x + width - RULE_WIDTH + 1, RULE_WIDTH)
        self.glyphs.append(np.stack([np.full(len(starts), RULE), starts, np.full(len(starts), y)], 1).astype(np.int32))


def draw(glyphs: torch.Tensor, page: torch.Tensor, area: int, size: tuple[int, int], count: int) -> torch.Tensor:
    """Draw pages of one size.

    Args:
        glyphs: int of shape (n, 3), as in `Page.glyphs`.
        page: int of shape (n,), which page each glyph is on.
        area: number of pixels of all the glyphs' pictures, which saves a GPU from being asked.
        size: (width, height) of the pages in pixels.

    Returns:
        Ink from 0 to GREYS, float of shape (count, height, width).
    """
    width, height = size
    shapes, pixels = load_glyphs().tensors(str(glyphs.device))
    shape = shapes[glyphs[:, 0]].long()
    start, tall, wide, left, top = shape.unbind(1)
    areas = tall * wide
    which = torch.repeat_interleave(areas, output_size=area)
    inside = torch.arange(area, device=glyphs.device) - (areas.cumsum(0) - areas)[which]
    x = (glyphs[:, 1] + left)[which] + inside % wide[which]
    y = (glyphs[:, 2] + top)[which] + inside // wide[which]
    ink = pixels[start[which] + inside].float() * ((x >= 0) & (x < width) & (y >= 0) & (y < height))
    place = (page.long()[which] * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
    paper = torch.zeros(count * height * width, device=glyphs.device)
    # Whole numbers: the sum does not depend on the order.
    return paper.index_add_(0, place, ink).clamp_(max=GREYS).view(count, height, width)


def area_of(glyphs: np.ndarray) -> int:
    """The number of pixels of the glyphs' pictures."""
    shapes = load_glyphs().shapes.numpy()[glyphs[:, 0]]
    return int((shapes[:, 1] * shapes[:, 2]).sum())


def draw_pages(pages: Sequence[Page]) -> np.ndarray:
    """Grey pictures of pages of one size on the CPU: uint8 of shape (pages, height, width), 255 is paper."""
    glyphs = [np.concatenate(page.glyphs) for page in pages]
    which = np.repeat(np.arange(len(pages)), [len(g) for g in glyphs])
    joined = np.concatenate(glyphs)
    ink = draw(torch.from_numpy(joined), torch.from_numpy(which), area_of(joined), pages[0].size, len(pages))
    return (255 - ink * (255 / GREYS)).byte().numpy()


def print_heading(page: Page, title: str, y: int, rng: random.Random, sizes: tuple[int, int]) -> int:
    """Print a title from `y` on, bold three times in four and large otherwise; returns the y below it."""
    style, least = ("Bold", sizes[0]) if rng.random() < 0.75 else ("Regular", 20)
    face = font(rng.choice(FAMILIES), style, rng.randint(least, sizes[1]))
    size, margin = load_glyphs().size[face], rng.randint(8, 24)
    width = page.size[0] - 2 * margin
    centred = rng.random() < 0.3
    lines = []
    for text in wrap(title, face, width) if title else []:
        x = margin + max(0, (width - int(edges(text, face)[-1])) // 2) * centred
        y += round(size * 1.25)
        lines.append(page.print(text, x, y, face))
    if lines:
        page.parts["heading"] = lines
    return y


def print_body(page: Page, text: str, y: int, rng: random.Random, lines: int) -> int:
    """Fill the page from `y` on with at most so many lines of small print; returns the y below them."""
    face = font(rng.choice(FAMILIES), "Regular", rng.randint(11, 13))
    size, margin = load_glyphs().size[face], rng.randint(8, 24)
    pitch = round(size * rng.uniform(1.25, 1.6))
    for line in wrap(text, face, page.size[0] - 2 * margin)[:lines] if text else []:
        if y + pitch > page.size[1] - 8:
            break
        y += pitch
        page.print(line, margin, y, face)
    return y


def print_letterhead(page: Page, text: str, rng: random.Random) -> int:
    """Print who writes at the top of a page, if anyone; returns the y below it."""
    y = rng.randint(2, 10)
    if text:
        face = font(rng.choice(FAMILIES), "Regular", rng.randint(13, 15))
        x, width = rng.randint(8, 24), int(edges(text, face)[-1])
        if rng.random() < 0.3:
            x = max(x, page.size[0] - x - width)
        y += load_glyphs().size[face]
        page.parts["letterhead"] = [page.print(text, x, y, face)]
        if rng.random() < 0.6:
            page.rule(8, y + 7, page.size[0] - 16)
        y += 8
    return y


def lay_out_letter(size: tuple[int, int], letterhead: str, title: str, body: str, rng: random.Random) -> Page:
    """A letter: letterhead, heading, body text down to a random height. Empty texts are left out."""
    page = Page(size)
    y = print_letterhead(page, letterhead, rng)
    y = print_heading(page, title, y + rng.randint(0, size[1] // 5), rng, (17, 24))
    print_body(page, body, y + rng.randint(4, 16), rng, rng.randint(3, 30))
    return page


def lay_out_form(
    size: tuple[int, int], letterhead: str, title: str, values: dict[str, str], body: str, rng: random.Random
) -> Page:
    """A form: letterhead, heading, one line per value in the order given, small print above or below them."""
    page = Page(size)
    y = print_letterhead(page, letterhead, rng)
    y = print_heading(page, title, y + rng.randint(0, 16), rng, (17, 22)) + rng.randint(2, 12)
    if rng.random() < 0.3:
        y = print_body(page, body, y, rng, rng.randint(1, 4)) + rng.randint(4, 14)
    family, points = rng.choice(FAMILIES), rng.randint(15, 18)
    key_font = font(family, rng.choice(["Regular", "Bold"]), points)
    value_font = font(family, "Regular", points)
    margin, gap = rng.randint(8, 24), rng.randint(5, 20)
    ends = [int(edges(f"{key}:", key_font)[-1]) for key in values]
    aligned = rng.random() < 0.5
    pitch = round(points * rng.choice([1.4, 1.6, 1.8]))
    ruled = rng.random() < 0.3
    for (key, value), end in zip(values.items(), ends, strict=True):
        y += pitch
        page.keys.append(page.print(f"{key}:", margin, y, key_font))
        x = margin + (max(ends) if aligned else end) + gap
        page.parts[f"value of {key}"] = [page.print(value, x, y, value_font)]
        if ruled:
            page.rule(margin, y + 6, size[0] - 2 * margin)
    print_body(page, body, y + rng.randint(6, 20), rng, rng.randint(0, 20))
    return page


def make_number(rng: random.Random) -> str:
    """An identifier such as "INV-20417"."""
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(4, 6)))
    return rng.choice(["", "INV-", "No. ", "A-", "R", f"20{rng.randint(10, 29)}/"]) + digits


def make_date(rng: random.Random) -> str:
    """A date in one of three notations."""
    year, month, day = rng.randint(1990, 2029), rng.randint(1, 12), rng.randint(1, 28)
    return rng.choice(
        [f"{year}-{month:02}-{day:02}", f"{day:02}.{month:02}.{year}", f"{day} {MONTHS[month - 1]} {year}"]
    )


def make_total(rng: random.Random) -> str:
    """An amount such as "1,204.50"."""
    return f"{int(10 ** rng.uniform(0.5, 4)):,}.{rng.randint(0, 99):02}"
