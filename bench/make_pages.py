"""Draw pages of the size of scans, 900 to 1540 pixels on the longer side, with answers of 4 to 60 tokens.

python -m bench.make_pages /tmp/pages --count 64
"""

import argparse
import json
import random
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dataset.make_dataset import BODY, TITLE_QUESTION


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="shrink the drawn pages, for quick trials on a CPU")
    return parser.parse_args()


def make_pages(output: Path, count: int, seed: int = 0, scale: float = 1.0) -> Path:
    """Draw the pages into a folder; the file of their records."""
    rng = random.Random(seed)
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "pages.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            height = rng.randint(900, 1540)
            page = Image.new("L", (round(height * rng.uniform(0.7, 0.8)), height), 255)
            draw, font = ImageDraw.Draw(page), ImageFont.load_default(22)
            words = rng.choices(BODY, k=600)
            for y, line in enumerate(textwrap.wrap(" ".join(words), page.width // 13)):
                draw.text((60, 80 + 30 * y), line, 20, font)
            if scale != 1:
                page = page.resize((round(page.width * scale), round(page.height * scale)))
            page.save(output / f"{number}.png")
            content = [{"type": "text", "text": TITLE_QUESTION}, {"type": "image", "image": f"{number}.png"}]
            expected = " ".join(rng.choices(BODY, k=rng.randint(3, 50)))
            record = {"id": number, "messages": [{"role": "user", "content": content}], "expected": expected}
            file.write(json.dumps(record) + "\n")
    return output / "pages.jsonl"


def main() -> None:
    args = parse_arguments()
    make_pages(args.output, args.count, args.seed, args.scale)


if __name__ == "__main__":
    main()
