"""Cut the characters that the sample's pages are printed with out of free fonts: glyphs.npz.

    python -m models.pretraining.glyphs --fonts FOLDER [--output models/pretraining/glyphs.npz]

FOLDER holds FAMILY-Regular.ttf and FAMILY-Bold.ttf for the families below. A page is put together from these pictures,
on the CPU or on a GPU, and looks the same with every version of Pillow and FreeType.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import ImageFont

FAMILIES = "DejaVuSans DejaVuSerif LiberationSans LiberationSerif Carlito Caladea Lato".split()
SIZES = {"Regular": (11, 12, 13, 14, 15, 16, 17, 18, 20, 22), "Bold": (13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 24)}
# Letters, digits and signs of Western European print; a character's code is its byte in this encoding.
ENCODING = "cp1252"
CHARACTERS = [
    *list(range(33, 127)),
    *"€„…‘’“”–—¡£§©«®°±²³·»¿".encode(ENCODING),
    *(c for c in range(192, 256) if c not in (215, 247)),
]
GREYS = 15  # of the pictures: 0 is paper, 15 is ink
RULE, RULE_WIDTH = 1, 8  # the code of a piece of a ruled line, and its pixels


def cut(path: Path, size: int) -> dict[str, np.ndarray]:
    """One font: start, height, width, left, top, advance of the 256 codes, and `pixels`, all pictures in a row.

    `left` and `top` are the picture's corner seen from the pen, which stands on the base line; `top` is negative above
    it. All in pixels.
    """
    font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    table = {name: np.zeros(256, np.int32) for name in ("start", "height", "width", "left", "top", "advance")}
    pictures = [np.full(RULE_WIDTH, GREYS, np.uint8)]
    table["height"][RULE], table["width"][RULE], table["advance"][RULE] = 1, RULE_WIDTH, RULE_WIDTH
    filled = RULE_WIDTH
    for code in [32, *CHARACTERS]:
        character = bytes([code]).decode(ENCODING)
        mask, (left, top) = font.getmask2(character, mode="L", anchor="ls")
        width, height = mask.size
        table["advance"][code] = round(font.getlength(character))
        if width * height:
            picture = np.asarray(mask, np.uint16).reshape(-1) * GREYS / 255
            pictures.append(picture.round().astype(np.uint8))
            table["start"][code], table["height"][code], table["width"][code] = filled, height, width
            table["left"][code], table["top"][code] = left, top
            filled += width * height
    return table | {"pixels": np.concatenate(pictures)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, required=True, help="folder with FAMILY-Regular.ttf and FAMILY-Bold.ttf")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("glyphs.npz"))
    args = parser.parse_args()

    names = [(family, style, size) for family in FAMILIES for style, sizes in SIZES.items() for size in sizes]
    fonts = [cut(args.fonts / f"{family}-{style}.ttf", size) for family, style, size in names]
    starts = np.cumsum([0] + [len(font["pixels"]) for font in fonts])
    arrays = {
        name: np.stack([font[name] for font in fonts]).astype(np.int8)
        for name in fonts[0]
        if name not in ("start", "pixels")
    }
    arrays["start"] = np.stack([font["start"] + start for font, start in zip(fonts, starts, strict=False)])
    # Two greys to a byte.
    pixels = np.concatenate([font["pixels"] for font in fonts] + [np.zeros(1, np.uint8)])
    pixels = pixels[: len(pixels) // 2 * 2].reshape(-1, 2)
    np.savez_compressed(
        args.output, names=[f"{f}-{s}-{z}" for f, s, z in names], pixels=pixels[:, 0] * 16 + pixels[:, 1], **arrays
    )
    print(f"{len(names)} fonts, {starts[-1]:,} pixels, {args.output.stat().st_size:,} bytes in {args.output}")


if __name__ == "__main__":
    main()
