"""Score a predictions file: how many answers are exactly right, how far off the others are, and which they are.

    python -m score <name>.jsonl [-e errors.jsonl] [--by FIELD] [--compare OTHER.jsonl]

The first line printed is "Accuracy = hits/count = x" with its 95 % interval. An answer is right if it equals the
expected one, white space around both aside. Rows that predict could not answer (with `error`, or without `actual`)
count as wrong; rows without `expected` cannot be scored and are left out; both are named on stderr.

--compare says whether FILE is better than OTHER on the same rows, and lists what it fixed and broke.
"""

import contextlib
import json
import sys
from pathlib import Path

from mistral_ft.errors import ArgumentParser, run_step
from mistral_ft.files import atomic_write

FOLDS = ("nfc", "case", "space")


def parse_arguments():
    parser = ArgumentParser(prog="python -m score", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", help="predictions: JSONL with `expected` and `actual`")
    parser.add_argument("-e", "--errors", metavar="FILE", help="write the wrong records to FILE")
    parser.add_argument(
        "--by", metavar="FIELD", help="accuracy by a record's field (a.b for nested ones), answer_length or page_size"
    )
    parser.add_argument("--images_dir", type=Path, help="folder of the images, for page_size (default: FILE's own)")
    parser.add_argument("--compare", metavar="OTHER", help="an earlier predictions file of the same records")
    parser.add_argument("--broken", metavar="FILE", help="with --compare: write the rows that OTHER has right to FILE")
    parser.add_argument(
        "--normalize", nargs="*", choices=FOLDS, default=FOLDS, help="what normalised accuracy folds (default: all)"
    )
    parser.add_argument("--fail_under", type=float, metavar="X", help="exit code 1 if the accuracy is below X")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()
    outputs = [Path(path).resolve() for path in (args.errors, args.broken) if path]
    if len({*outputs, *(Path(path).resolve() for path in (args.file, args.compare) if path)}) < (
        1 + bool(args.compare) + len(outputs)
    ):
        parser.error("two of the files are the same one")
    if args.broken and not args.compare:
        parser.error("--broken has no effect without --compare")
    if args.fail_under is not None and not 0 <= args.fail_under <= 1:
        parser.error(f"--fail_under {args.fail_under:g}: must be a share between 0 and 1")
    return args


def main() -> int:
    # 1. Arguments.
    args = parse_arguments()
    from mistral_ft.scoring import Options, figures, score_file  # their libraries are not needed for --help

    # 2. Rows, summed part by part; wrong ones are written as they are found.
    options = Options(tuple(args.normalize), args.by, args.images_dir or Path(args.file).parent, bool(args.errors))
    with atomic_write(args.errors, "wb") if args.errors else contextlib.nullcontext() as wrong:
        score = score_file(args.file, options, wrong)
    comparison = None
    if args.compare:
        from mistral_ft.comparison import compare

        comparison = compare(args.compare, args.file)
        if args.broken:
            with atomic_write(args.broken) as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in comparison.broken)

    # 3. What came out.
    result = figures(score.totals)
    slices = {name: figures(totals) for name, totals in score.slices.items()}
    if args.json:
        print_json(result, slices, comparison, score)
    else:
        print_figures(result)
        print_slices(args.by, slices)
        if comparison:
            print_comparison(args.compare, comparison)
        if args.errors:
            print(f"{score.totals.count - score.totals.hits} wrong records in {args.errors}")
        if args.broken:
            print(f"{len(comparison.broken)} broken records in {args.broken}")
    name_rows(score)
    return 1 if args.fail_under is not None and result["accuracy"] < args.fail_under else 0


def print_figures(result: dict) -> None:
    """The accuracy, and how far off the answers are."""
    print(
        f"Accuracy = {result['hits']}/{result['count']} = {result['accuracy']:.4f} "
        f"(95 % interval {result['accuracy_low']:.3f} to {result['accuracy_high']:.3f})"
    )
    rows = [
        ("normalised accuracy", result["normalised_accuracy"], "without capitals, runs of spaces, Unicode forms"),
        ("character error rate", result["cer"], "edits per expected character, 0 is best"),
        ("word error rate", result["wer"], "edits per expected word, 0 is best"),
        ("ANLS", result["anls"], "edit similarity as in DocVQA, 1 is best"),
        ("token F1", result["token_f1"], "shared words as in SQuAD, 1 is best"),
    ]
    if "json" in result:
        fields = result["json"]
        rows += [
            ("valid JSON", fields["valid"], f"of the {fields['count']} answers that should be an object"),
            ("field precision", fields["precision"], "answered fields that are right"),
            ("field recall", fields["recall"], "expected fields that are right"),
            ("field F1", fields["f1"], ""),
            *((f"  {path}", share, "") for path, share in sorted(fields["fields"].items(), key=lambda item: item[1])),
        ]
    width = max(len(name) for name, _, _ in rows)
    for name, value, meaning in rows:
        print(f"{name:<{width}}  {'-' if value is None else f'{value:.4f}'}  {meaning}".rstrip())


def print_slices(by: str | None, slices: dict[str, dict], shown: int = 20) -> None:
    """Accuracy by slice, the worst first."""
    if not by:
        return
    worst = sorted(slices.items(), key=lambda item: (item[1]["accuracy"], -item[1]["count"], item[0]))
    width = max(len(name) for name, _ in worst[:shown])
    print(f"\nBy {by}, worst first:")
    for name, part in worst[:shown]:
        interval = f"{part['accuracy_low']:.3f} to {part['accuracy_high']:.3f}"
        print(f"{name:<{width}}  {part['accuracy']:.4f}  ({interval})  {part['hits']}/{part['count']}")
    if len(worst) > shown:
        print(f"… and {len(worst) - shown} more")


def print_comparison(other: str, comparison) -> None:
    """Better, worse or cannot tell, and by how much."""
    print(f"\nAgainst {other}, on {comparison.count} rows: {comparison.before} right there, {comparison.after} here")
    print(f"{len(comparison.fixed)} fixed, {len(comparison.broken)} broken, McNemar p = {comparison.p_value:.4g}")
    print(f"Verdict: {comparison.verdict} at 95 %")
    for name, (difference, low, high) in comparison.differences.items():
        print(f"{name:<8}  {difference:+.4f}  (95 % interval {low:+.4f} to {high:+.4f})")
    if comparison.left_out:
        print(f"{comparison.left_out} rows are in one file only, or have no `expected`", file=sys.stderr)


def print_json(result: dict, slices: dict[str, dict], comparison, score) -> None:
    """Everything as one JSON object, for machines."""
    rows = {"with_error": len(score.with_error), "unanswered": len(score.unanswered)}
    rows |= {"without_expected": len(score.unexpected), "duplicate_ids": score.duplicate_ids}
    result = result | {"rows": rows}
    if slices:
        result["slices"] = slices
    if comparison:
        result["comparison"] = {
            "count": comparison.count,
            "before": comparison.before,
            "after": comparison.after,
            "fixed": [row.get("id") for row in comparison.fixed],
            "broken": [row.get("id") for row in comparison.broken],
            "p_value": comparison.p_value,
            "verdict": comparison.verdict,
            "differences": comparison.differences,
        }
    print(json.dumps(result, ensure_ascii=False))


def name_rows(score, shown: int = 20) -> None:
    """Say on stderr which rows need a word."""
    for lines, what in (
        (score.with_error, "with an `error` count as wrong"),
        (score.unanswered, "without `actual` count as wrong"),
        (score.unexpected, "without `expected` are left out"),
    ):
        if lines:
            more = ", …" if len(lines) > shown else ""
            print(f"Rows {what}: {len(lines)} (lines {', '.join(map(str, lines[:shown]))}{more})", file=sys.stderr)
    if score.duplicate_ids:
        print(f"Rows with an id that stands in the file before: {score.duplicate_ids}", file=sys.stderr)


if __name__ == "__main__":
    run_step(main)
