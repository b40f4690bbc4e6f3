"""Time score on made-up predictions, a fifth of them wrong: seconds and the peak memory of its largest process.

python -m bench.score_million /tmp/predictions.jsonl --rows 1000000 [flags of score …]
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from mistral_ft.files import atomic_write

WORDS = "salt storage town clocks harbour fees of the on bridge tolls lamp oil ledger market river ferry mill".split()


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the answers; the expected ones are always the same")
    return parser.parse_known_args()


def main() -> None:
    args, flags = parse_arguments()
    titles, answers = random.Random(0), random.Random(args.seed)
    with atomic_write(args.file) as file:
        for number in range(args.rows):
            file.write(json.dumps(prediction(number, titles, answers)) + "\n")

    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "score", args.file, *flags], check=True)
    seconds, memory = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"{args.rows:,} rows, {args.file.stat().st_size >> 20} MiB: {seconds:.1f} s, {memory >> 10} MiB")


def prediction(number: int, titles: random.Random, answers: random.Random) -> dict:
    words = ["Circular", str(titles.randrange(1000)), "on", *titles.choices(WORDS, k=titles.randrange(2, 8))]
    expected = " ".join(words)
    sure = answers.uniform(0.6, 1)
    if answers.random() > sure:
        kind = answers.randrange(4)
        if kind == 0:
            words[1] = words[1].replace("1", "7") + "0"
        elif kind == 1:
            del words[answers.randrange(len(words))]
        elif kind == 2:
            words.insert(1, "No.")
        else:
            words = answers.choices(WORDS, k=5)
    page = {"type": "image", "image": f"page-{number:07}.png"}
    question = {"type": "text", "text": "What is the title of the following document?"}
    return {
        "id": number,
        "messages": [{"role": "user", "content": [question, page]}],
        "expected": expected,
        "actual": " ".join(words),
        "confidence": {"sum": 2 * math.log(sure), "mean": math.log(sure) / 2, "min": math.log(sure), "tokens": 9},
        "finish_reason": "stop",
    }


if __name__ == "__main__":
    main()
