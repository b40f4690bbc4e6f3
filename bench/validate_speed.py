"""Time validate_data on made-up text records and on pages: rows per minute and the peak memory of its main process.

python -m bench.validate_speed /tmp/validate --rows 100000 1000000 --pages 2000 [--model_id models/tiny]

Pages are drawn once, 1240 × 1754 px (A4 at 150 dpi), as PNG; each has bytes of its own. A PDF is a page of print.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from bench.hostile_pdfs import good
from bench.score_million import WORDS
from mistral_ft.files import atomic_write

DRAWN = 40  # different pages; the others are copies with a note of their own


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--pages", type=int, default=2000)
    parser.add_argument("--model_id", help="count tokens too")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    flags = ["--model_id", args.model_id] if args.model_id else []

    rng = random.Random(0)
    for rows in args.rows:
        path = args.folder / f"text-{rows}.jsonl"
        write(path, (record(number, " ".join(rng.choices(WORDS, k=30)), rng) for number in range(rows)))
        measure(f"{rows:,} text records", path, rows, flags)
    if args.pages:
        draw(args.folder, args.pages, rng)
        path = args.folder / f"pages-{args.pages}.jsonl"
        write(path, (record(number, "Title?", rng, f"{number}.png") for number in range(args.pages)))
        measure(f"{args.pages:,} pages", path, args.pages, flags)
        path = args.folder / f"pdfs-{args.pages}.jsonl"
        for number in range(args.pages):
            (args.folder / f"{number}.pdf").write_bytes(good(number))
        write(path, (record(number, "Title?", rng, f"{number}.pdf") for number in range(args.pages)))
        measure(f"{args.pages:,} PDFs", path, args.pages, flags)


def record(number: int, question: str, rng: random.Random, image: str | None = None) -> dict:
    content = [{"type": "text", "text": question}, *([{"type": "image", "image": image}] if image else [])]
    answer = " ".join(rng.choices(WORDS, k=10))
    return {"id": number, "messages": [{"role": "user", "content": content}], "expected": answer}


def write(path: Path, rows) -> None:
    with atomic_write(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def draw(folder: Path, count: int, rng: random.Random) -> None:
    font = ImageFont.load_default(22)
    pages = []
    for _ in range(min(DRAWN, count)):
        page = Image.new("RGB", (1240, 1754), "white")
        text = textwrap.fill(" ".join(rng.choices(WORDS, k=700)), 95)
        ImageDraw.Draw(page).multiline_text((60, 60), text, "black", font)
        pages.append(page)
    for number in range(count):
        note = PngImagePlugin.PngInfo()
        note.add_text("page", str(number))
        path = folder / f"{number}.png"
        if not path.exists():
            pages[number % DRAWN].save(path, pnginfo=note, compress_level=1)


def measure(what: str, path: Path, rows: int, flags: list[str]) -> None:
    """Run the step and print its speed; memory is what the kernel counted at most for the main process alone."""
    code = (
        "import atexit, re, sys, runpy; "
        "atexit.register(lambda: print(re.search(r'VmHWM.*', open('/proc/self/status').read())[0])); "
        "runpy.run_module('validate_data', run_name='__main__', alter_sys=True)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, path, *flags], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    memory = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1])
    print(f"{what}: {seconds:.1f} s, {rows / seconds * 60:,.0f} a minute, {memory >> 10} MiB")


if __name__ == "__main__":
    main()
