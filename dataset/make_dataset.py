"""Draw the sample: fake pages with a title, and the question what the title is.

    python -m dataset.make_dataset [--output dataset]

Every word is made up or common, no page is real. The folder holds train.jsonl, test.jsonl and the PNG pages; titles of
the test pages do not occur in training.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

QUESTION = "What is the title of the following document?"
KINDS = "Order Notice Decree Report Minutes Statute Circular Permit Record Charter".split()
TOPICS = (
    "Road Repair|Water Supply|Market Days|School Meals|Harbour Fees|Night Trains|Forest Paths|Public Baths|"
    "Bread Prices|Bee Keeping|Lamp Oil|Bridge Tolls|Mail Coaches|Salt Storage|Chimney Fires|Town Clocks"
).split("|")
BODY = (
    "the council of the town has met and heard all who came to speak on this matter and finds that what was agreed "
    "last year still holds but for the fees which are set anew each spring by the clerk after the accounts are closed"
).split()
INK, PAPER = 20, 255


def make_titles(rng: random.Random, count: int) -> list[str]:
    """`count` different titles, such as "Decree 41 on Bridge Tolls"."""
    titles: dict[str, None] = {}
    while len(titles) < count:
        titles[f"{rng.choice(KINDS)} {rng.randint(2, 99)} on {rng.choice(TOPICS)}"] = None
    return list(titles)


def draw_page(title: str, rng: random.Random) -> Image.Image:
    """A page of about 400 x 560 pixels: letterhead, title in one or two lines, body text."""
    width, height = rng.randrange(364, 449, 14), rng.randrange(504, 617, 14)
    page = Image.new("L", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    margin = rng.randint(24, 40)
    small, body, large = (ImageFont.load_default(size) for size in (11, 13, rng.randint(20, 26)))
    draw.text((margin, 16), f"Town of {rng.choice(['Ambleford', 'Brackwater', 'Corley'])}", INK, small)
    draw.line((margin, 34, width - margin, 34), INK)
    y = rng.randint(56, 110)
    for line in wrap(draw, title.split(), large, width - 2 * margin):
        draw.text((margin, y), line, INK, large)
        y += large.size + 6
    y += 20
    words = [rng.choice(BODY) for _ in range(rng.randint(60, 110))]
    for line in wrap(draw, words, body, width - 2 * margin):
        if y > height - 40:
            break
        draw.text((margin, y), line, INK, body)
        y += 18
    return page


def wrap(draw: ImageDraw.ImageDraw, words: list[str], font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break words into lines that fit into `width` pixels."""
    lines = [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write")
    parser.add_argument("--train", type=int, default=24, help="number of training pages")
    parser.add_argument("--test", type=int, default=8, help="number of test pages")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    titles = make_titles(rng, args.train + args.test)
    for name, part in (("train", titles[: args.train]), ("test", titles[args.train :])):
        with open(args.output / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for number, title in enumerate(part, 1):
                image = f"{name}-{number:03}.png"
                # 16 greys are enough for print, and make the file small.
                draw_page(title, rng).quantize(16).save(args.output / image, optimize=True)
                content = [{"type": "text", "text": QUESTION}, {"type": "image", "image": image}]
                record = {
                    "id": f"{name}-{number:03}",
                    "messages": [{"role": "user", "content": content}],
                    "expected": title,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
