"""Score a predictions file: how many answers are exactly right, and which are not.

    python -m score <name>.jsonl [-e errors.jsonl]

The first line printed is "Accuracy = hits/count = x". An answer is right if it equals the expected one, white space
around both aside. Rows that predict could not answer (with `error`, or without `actual`) count as wrong; rows without
`expected` cannot be scored and are left out; both are named on stderr. -e writes the wrong records to a file.
"""

import json
import sys

from mistral_ft.errors import ArgumentParser, RecordError, UserError, raise_all, run_step
from mistral_ft.files import atomic_write
from mistral_ft.metrics import is_hit
from mistral_ft.records import read_jsonl


def main() -> None:
    # 1. Arguments.
    parser = ArgumentParser(prog="python -m score", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", help="predictions: JSONL with `expected` and `actual`")
    parser.add_argument("-e", "--errors", metavar="FILE", help="write the wrong records to FILE")
    args = parser.parse_args()

    # 2. Rows.
    errors = []
    rows = list(read_jsonl(args.file, errors))
    for line, row in rows:
        if not isinstance(row.get("expected", ""), (str, type(None))):
            errors.append(RecordError(args.file, line, "`expected` must be a string"))
    raise_all(errors)
    scored = [(line, row) for line, row in rows if row.get("expected") is not None]
    if not scored:
        raise UserError(f"{args.file}: no row has `expected`, so there is nothing to score against")

    # 3. The score.
    wrong = [row for _, row in scored if not is_hit(row)]
    hits = len(scored) - len(wrong)
    print(f"Accuracy = {hits}/{len(scored)} = {hits / len(scored):.4f}")

    # 4. Rows that need a word.
    name_lines("have an `error`, so they count as wrong", [n for n, row in scored if "error" in row])
    unanswered = [n for n, row in scored if row.get("actual") is None and "error" not in row]
    name_lines("have no `actual`, so they count as wrong", unanswered)
    name_lines("have no `expected`, so they are left out", [n for n, row in rows if row.get("expected") is None])

    # 5. The wrong records.
    if args.errors:
        with atomic_write(args.errors) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in wrong)
        print(f"{len(wrong)} wrong records in {args.errors}")


def name_lines(what: str, lines: list[int], shown: int = 20) -> None:
    """Say on stderr which rows need a word."""
    if lines:
        more = ", …" if len(lines) > shown else ""
        print(f"{len(lines)} rows {what}: lines {', '.join(map(str, lines[:shown]))}{more}", file=sys.stderr)


if __name__ == "__main__":
    run_step(main)
