"""Check data before a GPU is touched: read every line, open every image, name everything that is wrong.

    python -m validate_data dataset/train.jsonl [--eval dataset/test.jsonl] [--model_id models/tiny]

Problems are printed as `file:line: what`, warnings as `file:line: warning: what`, with a count of each kind at the
end. Of those that differ in names and numbers only, the first three are printed when they are found, and at the end
how many more there are and on which lines; --all prints every one. Fatal is what train refuses. With --model_id, whose
weights are not needed, rows are counted in tokens too: which are too long, which answers the tokenizer does not give
back, what size pages are fed at.

Exit code: 1 if anything is fatal, else 0; 2 if there was nothing to check.
"""

import argparse
import contextlib
from pathlib import Path

from mistral_ft.cli import ArgumentParser, run_step
from mistral_ft.files import atomic_write, check_target


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m validate_data", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="records to train on, all with `expected`")
    parser.add_argument(
        "--eval", nargs="+", default=[], metavar="FILE", help="records to predict, which training must not have seen"
    )
    parser.add_argument("--images_dir", help="folder that image paths are relative to (default: each file's own)")
    parser.add_argument("--max_image_pixels", type=int, help="pixels an image may have (default: 178 million)")
    parser.add_argument("--pdf_seconds", type=float, help="seconds of work a page of a PDF may take (default: 20)")
    parser.add_argument("--keep_image_tag", action="store_true", help="take <image> for text in rows without an image")
    parser.add_argument(
        "--model_id", help="model to train, a hub id or a folder, or an adapter: count tokens as it does"
    )
    parser.add_argument("--max_seq_length", type=int, help="tokens a record may have, with --model_id (default: 32768)")
    parser.add_argument("--write_clean", metavar="FILE", help="write the rows of FILE… that are not fatal to FILE")
    parser.add_argument("--report", metavar="FILE", help="write a page with all of it for a browser, such as data.html")
    parser.add_argument("--all", action="store_true", help="print every problem, also those like others before")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N rows with the trained tokens marked")
    args = parser.parse_args()
    if not args.files and not args.eval:
        parser.error("no FILE to check")
    inputs = [*args.files, *args.eval]
    if len({Path(path).resolve() for path in inputs}) < len(inputs):
        parser.error("two of the files are the same one")
    if args.model_id is None and (args.max_seq_length is not None or args.show):
        parser.error("--max_seq_length and --show have no effect without --model_id")
    if args.max_seq_length is not None and args.max_seq_length < 1:
        parser.error(f"--max_seq_length {args.max_seq_length}: must be at least 1")
    if args.show < 0:
        parser.error(f"--show {args.show}: must not be negative")
    for name in ("write_clean", "report"):
        target = getattr(args, name)
        if target and check_target(target).resolve() in {Path(path).resolve() for path in inputs}:
            parser.error(f"--{name} {target}: is one of the files to check; give another name")
    if args.report and args.write_clean and Path(args.report).resolve() == Path(args.write_clean).resolve():
        parser.error("--report and --write_clean are the same file")
    if args.write_clean:
        if not args.files:
            parser.error("--write_clean has no effect without a FILE to train on")
        if not args.images_dir and len({Path(path).resolve().parent for path in args.files}) > 1:
            parser.error("--write_clean of files in several folders needs --images_dir, one for all images")
    return args


def main() -> int | None:
    # 1. Arguments. What is imported later is not needed for --help.
    args = parse_arguments()
    from mistral_ft.data.pages import limit_pages
    from mistral_ft.data.processor import Processor
    from mistral_ft.data.records import find_images_dir
    from mistral_ft.data.row_images import keep_image_tag
    from mistral_ft.folders import locate
    from mistral_ft.html import visible
    from mistral_ft.progress import Progress
    from mistral_ft.validation.checker import CheckedRow, Source, check_files, describe, mark_trained
    from mistral_ft.validation.estimate import describe_training, is_measured
    from mistral_ft.validation.folding import Folds
    from mistral_ft.validation.tally import Tally

    limit_pages(args.max_image_pixels, args.pdf_seconds)
    keep_image_tag(args.keep_image_tag)
    sources = [
        Source(Path(path), find_images_dir(path, args.images_dir), is_eval)
        for is_eval, paths in ((False, args.files), (True, args.eval))
        for path in paths
    ]

    # 2. The model's tokenizer and page settings.
    model = locate(args.model_id) if args.model_id else None
    processor = Processor.from_model(model) if model else None
    fitter = processor.fitter if processor else None

    # 3. Row by row, on all cores.
    tally, folds, kept = Tally(sources), Folds(), 0
    shown: list[CheckedRow] = []
    with contextlib.ExitStack() as files:
        clean = files.enter_context(atomic_write(args.write_clean, "wb")) if args.write_clean else None
        rows = files.enter_context(contextlib.closing(check_files(sources, model, args.max_seq_length or 32768)))
        for row in rows:
            problems = tally.add(row)
            for problem in problems:
                if folds.add(row.place, problem) or args.all:
                    Progress.print(describe(row.place, problem))
            if any(problem.kind.fatal for problem in problems):
                continue
            if len(shown) < args.show:
                shown.append(row)
            if clean and not row.source.is_eval:
                clean.write(row.raw.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n") + b"\n")
                kept += 1

    # 4. Row against row: duplicates, pages that training and --eval share, formats.
    for place, problem in tally.compare_rows():
        if folds.add(place, problem) or args.all:
            print(describe(place, problem))
    for place, problem in [] if args.all else folds.rests():
        print(describe(place, problem))

    # 5. What it comes to.
    if processor:
        for row in shown:
            text = mark_trained(processor, row)
            print(f"{row.place}: {visible(text, len(text))}")
    training = []
    if processor and is_measured(processor.folder) and len(lengths := tally.lengths()):
        training = list(describe_training(lengths, tally.longest()))
    for text in (*tally.summary(fitter), *training, *tally.verdict()):
        print(visible(text, len(text)))
    if args.report:
        from mistral_ft.validation.report import report  # slow to import

        with atomic_write(args.report) as file:
            file.write(report(tally, folds, training, fitter))
        print(f"Report in {args.report}")
    if args.write_clean:
        print(f"{kept:,} rows in {args.write_clean}")
        images_dir = sources[0].images_dir
        if tally.images and images_dir.resolve() != Path(args.write_clean).resolve().parent:
            print(f"Use it with --images_dir {images_dir}")
    return 1 if tally.fatal else 0


if __name__ == "__main__":
    run_step(main)
