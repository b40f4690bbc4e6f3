"""Draw the sample: fake letters with the question what their title is, and fake invoices to turn into JSON.

    python -m dataset.make_dataset [--output dataset]

Every word is made up or common, no page is real. It writes the PNG pages, train.jsonl and test.jsonl (titles), and
train-invoices.jsonl and test-invoices.jsonl. Titles and values of the test pages occur neither in training nor in what
models/tiny was pre-trained on: `pages.reserved` tells them apart. test-reading.jsonl asks for the titles of the test
pages in the words and the form of that pre-training.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from models.pretraining import pages
from models.pretraining.pages import CELL, Page

TITLE_QUESTION = "What is the title of the following document?"
INVOICE_QUESTION = "Extract number, date and total as JSON."
KINDS = "Order Notice Decree Report Minutes Statute Circular Permit Record Charter Petition Warrant".split()
ADJECTIVES = "Public Winter Summer Local Northern Central Private Annual Common Royal Spring Modern Free Early".split()
NOUNS = (
    "Roads Water Markets Schools Harbour Trains Forest Baths Bread Bridges Coaches Salt Fires Clocks Gardens Ships "
    "Houses Fields Taxes Music Books Horses Lamps Rivers Mills Tools Papers Parks Walls Stones"
).split()
TOWNS = "Ambleford Brackwater Corley Dunmore Eastmere Fallowfield Grimsby Holloway Inverleith Kestwick".split()
FIRMS = "Miller Carver Baker Turner Fisher Cooper Mason Fuller Sawyer Chandler".split()
GOODS = "lamp rope barrel saddle ladder kettle bucket carpet mirror basket blanket hammer".split()
BODY = (
    "the council of the town has met and heard all who came to speak on this matter and finds that what was agreed "
    "last year still holds but for the fees which are set anew each spring by the clerk after the accounts are closed"
).split()


def make_title(rng: random.Random) -> str:
    """A title such as "Decree 41 on Public Bridges"."""
    kind, number, topic = rng.choice(KINDS), rng.randint(2, 99), f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    year, noun = rng.randint(1880, 2029), rng.choice(NOUNS).lower()
    return rng.choice(
        [
            f"{kind} {number} on {topic}",
            f"{kind} No. {number}/{year}",
            f"{kind} on {topic} and {rng.choice(NOUNS)}",
            f"{topic} in {rng.choice(TOWNS)}",
            f"{kind} of the town of {rng.choice(TOWNS)}",
            f"The {noun} of {rng.choice(TOWNS)}, {year}",
        ]
    )


def title_rows(test: bool, rng: random.Random) -> Iterator[tuple[Page, str, str]]:
    """Endless (page, question, answer), no title twice."""
    titles = set()
    while True:
        title = pages.draw_free(make_title, rng, test)
        if title in titles:
            continue
        titles.add(title)
        body = " ".join(rng.choice(BODY) for _ in range(rng.randint(30, 120)))
        letterhead = f"Town of {rng.choice(TOWNS)}" if rng.random() < 0.7 else ""
        yield pages.lay_out_letter(page_size(rng), letterhead, title, body, rng), TITLE_QUESTION, title


def invoice_rows(test: bool, rng: random.Random) -> Iterator[tuple[Page, str, str]]:
    """Endless (page, question, answer); the values stand in any order, some pages have one more."""
    while True:
        makers = {"Number": pages.make_number, "Date": pages.make_date, "Total": pages.make_total}
        values = {key: pages.draw_free(make, rng, test) for key, make in makers.items()}
        answer = json.dumps({key.lower(): value for key, value in values.items()}, ensure_ascii=False)
        if rng.random() < 0.5:
            values["Place"] = rng.choice(TOWNS)
        values = {key: values[key] for key in rng.sample(list(values), len(values))}
        goods = [
            f"{rng.randint(1, 9)} {rng.choice(GOODS)} {rng.randint(1, 99)}.{rng.randint(0, 99):02}" for _ in range(9)
        ]
        firm = f"{rng.choice(FIRMS)} and {rng.choice(FIRMS)}" if rng.random() < 0.7 else ""
        heading, body = rng.choice(["Invoice", "Receipt", "Bill", "Account"]), ", ".join(goods[: rng.randint(2, 9)])
        yield pages.lay_out_form(page_size(rng), firm, heading, values, body, rng), INVOICE_QUESTION, answer


def page_size(rng: random.Random) -> tuple[int, int]:
    """Width and height in pixels: whole cells, so that nothing is stretched."""
    return rng.randint(9, 12) * CELL, rng.randint(12, 16) * CELL


def make_record(name: str, question: str, answer: str) -> str:
    """A line of a JSONL file."""
    content = [{"type": "text", "text": question}, {"type": "image", "image": f"{name}.png"}]
    record = {"id": name, "messages": [{"role": "user", "content": content}], "expected": answer}
    return json.dumps(record, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write")
    parser.add_argument("--train", type=int, default=400, help="number of training pages per task")
    parser.add_argument("--test", type=int, default=100, help="number of test pages per task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    for task, make_rows in (("", title_rows), ("-invoices", invoice_rows)):
        for part, count in (("train", args.train), ("test", args.test)):
            rows = make_rows(part == "test", random.Random(f"{part}{task} {args.seed}"))
            lines, readings = [], []
            for number, (page, question, answer) in enumerate(itertools.islice(rows, count), 1):
                name = f"{part}{task}-{number:03}"
                # 16 greys, as many as the glyphs have, make the file small.
                picture = Image.fromarray(pages.draw_pages([page])[0]).quantize(16)
                picture.save(args.output / f"{name}.png", optimize=True)
                lines.append(make_record(name, question, answer))
                heading = " ".join(f"{line.text} |" for line in page.parts["heading"])
                readings.append(make_record(name, "Read the heading.", heading))
            (args.output / f"{part}{task}.jsonl").write_text("".join(lines), encoding="utf-8")
            if (part, task) == ("test", ""):
                (args.output / "test-reading.jsonl").write_text("".join(readings), encoding="utf-8")


if __name__ == "__main__":
    main()
