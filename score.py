"""Score a predictions file: how many answers are exactly right, how far off the others are, and which they are.

    python -m score <name>.jsonl [-e errors.jsonl] [--by FIELD] [--compare OTHER.jsonl]

The first line printed is "Accuracy = hits/count = x" with its 95 % interval. An answer is right if it equals the
expected one, white space around both aside. Rows that predict could not answer (with `error`, or without `actual`)
count as wrong; rows without `expected` cannot be scored and are left out; both are named on stderr.

--compare says whether FILE is better than OTHER on the same rows, and lists what it fixed and broke.
"""

import contextlib
import json
from pathlib import Path

from mistral_ft.confidence import KINDS
from mistral_ft.errors import ArgumentParser, UserError, run_step
from mistral_ft.files import atomic_write
from mistral_ft.metrics import FOLDS


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
    parser.add_argument(
        "--confidence", choices=KINDS, default="min", help="which of predict's confidences (default: min)"
    )
    parser.add_argument("--target", type=float, default=0.99, help="accuracy wanted without review (default: 0.99)")
    parser.add_argument(
        "--calibrate_on", metavar="OTHER", help="predictions of other records, to learn what a confidence is worth"
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
    if not 0 < args.target <= 1:
        parser.error(f"--target {args.target:g}: must be a share above 0, at most 1")
    if args.fail_under is not None and not 0 <= args.fail_under <= 1:
        parser.error(f"--fail_under {args.fail_under:g}: must be a share between 0 and 1")
    return args


def main() -> int:
    # 1. Arguments.
    args = parse_arguments()
    from mistral_ft import score_output as output  # its libraries are not needed for --help
    from mistral_ft.scoring import Options, figures, score_file

    # 2. Rows, summed part by part; wrong ones are written as they are found.
    images_dir = args.images_dir or Path(args.file).parent
    options = Options(tuple(args.normalize), args.by, images_dir, bool(args.errors), args.confidence)
    with atomic_write(args.errors, "wb") if args.errors else contextlib.nullcontext() as wrong:
        score = score_file(args.file, options, wrong)
    comparison = None
    if args.compare:
        from mistral_ft.comparison import compare

        comparison = compare(args.compare, args.file)
        if args.broken:
            with atomic_write(args.broken) as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in comparison.broken)

    if args.calibrate_on and not score.confidences:
        raise UserError(f"{args.file}: no row has a `confidence`, so --calibrate_on has no effect")
    sure = judge_confidence(score, args) if score.confidences else None

    # 3. What came out.
    result = figures(score.totals)
    slices = {name: figures(totals) for name, totals in score.slices.items()}
    if args.json:
        output.print_json(result, slices, comparison, score, sure)
    else:
        output.print_figures(result)
        output.print_slices(args.by, slices)
        if sure:
            output.print_confidence(sure, args.target)
        if comparison:
            output.print_comparison(args.compare, comparison)
        if args.errors:
            print(f"{score.totals.count - score.totals.hits} wrong records in {args.errors}")
        if args.broken:
            print(f"{len(comparison.broken)} broken records in {args.broken}")
    output.name_rows(score)
    return 1 if args.fail_under is not None and result["accuracy"] < args.fail_under else 0


def judge_confidence(score, args) -> dict:
    """Reliability, calibration error and the share to review, after calibration on another file if one is given."""
    from mistral_ft.confidence import calibrate, expected_calibration_error, reliability, review_for
    from mistral_ft.scoring import Options, score_file

    confidences = score.confidences
    if args.calibrate_on:
        other = score_file(args.calibrate_on, Options(confidence=args.confidence))
        if not other.confidences:
            raise UserError(f"{args.calibrate_on}: no row has a `confidence` to calibrate on")
        if shared := len(set(score.keys) & set(other.keys)):
            raise UserError(f"{args.calibrate_on}: shares {shared} records with {args.file}; calibrate on other ones")
        learned = calibrate(other.confidences, other.right)
        confidences = [learned(confidence) for confidence in confidences]
    bins = reliability(confidences, score.right)
    return {
        "count": len(confidences),
        "kind": args.confidence,
        "calibrated_on": args.calibrate_on,
        "expected_calibration_error": expected_calibration_error(bins),
        "bins": [vars(part) for part in bins],
        "review": vars(review_for(confidences, score.right, args.target)),
    }


if __name__ == "__main__":
    run_step(main)
