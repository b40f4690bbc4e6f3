"""Score a predictions file: how many answers are exactly right, how far off the others are, and which they are.

    python -m score <name>.jsonl [-e errors.jsonl] [--by FIELD] [--compare OTHER.jsonl]

The first line printed is "Accuracy = hits/count = x" with its 95 % interval. An answer is right if it equals the
expected one, or one of them where `expected` is a list, white space around both aside. Rows that predict could not
answer (with `error`, or without `actual`) count as wrong; rows without `expected` cannot be scored and are left out;
both are named on stderr.

--compare says whether FILE is better than OTHER on the same rows, and lists what it fixed and broke. Rows of plain text
are scored by perplexity instead.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from mistral_ft.cli import ArgumentParser, run_step
from mistral_ft.errors import UserError
from mistral_ft.files import atomic_write, check_target
from mistral_ft.scoring.confidence import KINDS
from mistral_ft.scoring.metrics import FOLDS

TARGET = 0.99
EXAMPLES = 60  # wrong rows shown in the report, drawn by lot if there are more


def parse_arguments() -> argparse.Namespace:
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
    parser.add_argument("--confidence", choices=KINDS, help=f"which of predict's confidences (default: {KINDS[0]})")
    parser.add_argument("--target", type=float, help=f"accuracy wanted without review (default: {TARGET})")
    parser.add_argument(
        "--calibrate_on", metavar="OTHER", help="predictions of other records, to learn what a confidence is worth"
    )
    parser.add_argument("--fail_under", type=float, metavar="X", help="exit code 1 if the accuracy is below X")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--report", metavar="FILE", help="write all of it as one HTML page, with plots and examples")
    args = parser.parse_args()
    inputs = [path for path in (args.file, args.compare, args.calibrate_on) if path]
    outputs = [check_target(path) for path in (args.errors, args.broken, args.report) if path]
    if len({Path(path).resolve() for path in (*inputs, *outputs)}) < len(inputs) + len(outputs):
        parser.error("two of the files are the same one")
    if args.broken and not args.compare:
        parser.error("--broken has no effect without --compare")
    if args.images_dir and args.by != "page_size":
        parser.error("--images_dir has no effect without --by page_size")
    if args.target is not None and not 0 < args.target <= 1:
        parser.error(f"--target {args.target:g}: must be a share above 0, at most 1")
    if args.fail_under is not None and not 0 <= args.fail_under <= 1:
        parser.error(f"--fail_under {args.fail_under:g}: must be a share between 0 and 1")
    return args


def main() -> int:
    # 1. Arguments. What is imported later is not needed for --help.
    args = parse_arguments()
    from mistral_ft.scoring import text as output
    from mistral_ft.scoring.perplexity import compare_texts
    from mistral_ft.scoring.summary import describe_comparison, judge_confidence, summarize
    from mistral_ft.scoring.totals import Options, read_lines, score_file

    # Files appear at the end, if nothing went wrong.
    with contextlib.ExitStack() as files:
        # 2. Rows, summed part by part; wrong ones are written as they are found.
        options = Options(
            folds=tuple(args.normalize),
            by=args.by,
            images_dir=args.images_dir or Path(args.file).parent,
            keep_wrong=bool(args.errors),
            keep_pairing=bool(args.compare or args.calibrate_on),
            examples=EXAMPLES if args.report else 0,
            confidence=args.confidence or KINDS[0],
        )
        score = score_file(
            args.file, options, files.enter_context(atomic_write(args.errors, "wb")) if args.errors else None
        )
        if not score.confidences and (args.calibrate_on or args.confidence or args.target):
            raise UserError(f"{args.file}: no row has a usable `confidence`, so nothing can be said about review")
        for_answers = {"-e": args.errors, "--by": args.by, "--broken": args.broken, "--fail_under": args.fail_under}
        if not score.totals.count and (
            useless := [flag for flag, value in (for_answers | {"--report": args.report}).items() if value is not None]
        ):
            raise UserError(f"{', '.join(useless)}: {args.file} holds plain text only, which has no answers")
        pairing = Options(keep_pairing=True, confidence=options.confidence)

        # 3. Is it better than another file?
        comparison = text_comparison = None
        if args.compare:
            from mistral_ft.scoring.comparison import compare

            before = score_file(args.compare, pairing)
            if score.texts.lines:
                texts = compare_texts(before.texts, score.texts, (args.compare, args.file))
                text_comparison = {"other": args.compare} | texts
        if args.compare and score.totals.count:
            found = compare(before, score, (args.compare, args.file))
            comparison = describe_comparison(found, args.file, args.compare)
            if args.broken:
                broken = read_lines(args.file, (row["line"] for row in comparison["broken"]))
                file = files.enter_context(atomic_write(args.broken))
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for _, row in broken)

        # 4. What is the confidence worth?
        confidence = None
        if score.confidences:
            other = score_file(args.calibrate_on, pairing) if args.calibrate_on else None
            target = args.target or TARGET
            confidence = judge_confidence(score, options.confidence, target, other, args.calibrate_on)

        # 5. What came out, in one object and as text, JSON or page.
        result = summarize(score, args.by, confidence, comparison, text_comparison)
        if args.report:
            from mistral_ft.scoring.report import report

            examples = sorted(score.mistakes.examples, key=lambda example: example.line)
            page = report(result, args.file, args.normalize, [example.shown for example in examples])
            files.enter_context(atomic_write(args.report)).write(page)

    if args.json:
        output.print_json(result)
    else:
        output.print_text(result, args.normalize)
        if args.errors:
            print(f"{result['count'] - result['hits']} wrong records in {args.errors}")
        if comparison and args.broken:
            print(f"{len(comparison['broken'])} broken records in {args.broken}")
        if args.report:
            print(f"Report in {args.report}")
    output.name_rows(result)
    if args.fail_under is not None and result["accuracy"] < args.fail_under:
        print(f"The accuracy is below --fail_under {args.fail_under:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_step(main)
