"""Turn rows of another toolkit's format into this one's records, keep a part of them, split them for train and test.

    python -m reformat_data alpaca.json records.jsonl [--split 0.9] [--where FIELD=VALUE] [--limit N]

IN is a file or table of any kind that train reads; its rows are Alpaca, ShareGPT, LLaVA, OpenAI chat, prompt and answer
columns, [INST] text, or records. Or it is LLaMA-Factory's dataset_info.json (dataset_info.json:NAME for one set of
several), a folder with a JSON file per page, or with --format FUNSD's annotations or Label Studio's export.
Writes OUT, or with --split OUT's name as <name>.train.jsonl and <name>.test.jsonl. IN is never touched. Images in data:
and file: URLs become files in <name>-images/ beside OUT; other image paths stay as they are. Rows that cannot be
converted are left out, and named with the reason; the exit code is 0 unless nothing could be written.
"""

import argparse
import contextlib
import itertools
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mistral_ft.cli import ArgumentParser, run_step
from mistral_ft.data.embedded_images import ImageFolder
from mistral_ft.data.foreign.annotations import ANNOTATIONS, JsonFolder
from mistral_ft.data.foreign.llama_factory import INFO, ForeignSet, find_set, split_name
from mistral_ft.data.foreign.unread import refuse_unread
from mistral_ft.data.formats import FORMATS, convert, how_to_map, possible_formats, without_known_nulls
from mistral_ft.data.json_fields import look_up
from mistral_ft.data.pages import fingerprint
from mistral_ft.data.records import check_record, image_blocks
from mistral_ft.data.references import resolve
from mistral_ft.data.row_images import keep_image_tag
from mistral_ft.data.row_keys import hash_json
from mistral_ft.data.rows import RowSource, data_files, is_table, read_objects
from mistral_ft.data.splitting import Splitter
from mistral_ft.errors import RecordError, UserError
from mistral_ft.files import JsonObject, atomic_write, check_target
from mistral_ft.progress import Progress

FIRST_ROWS = 100  # that the format is told by
LINES_SHOWN = 5  # of the rows left out for one reason


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m reformat_data", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "input", metavar="IN", type=Path, help="JSONL, one JSON array, parquet, a folder or hub id of `datasets`"
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="JSONL file of records to write")
    parser.add_argument(
        "--format",
        choices=("auto", *FORMATS, "llama_factory", *ANNOTATIONS),
        default="auto",
        help="of IN (default: by its first rows)",
    )
    parser.add_argument(
        "--map",
        action="append",
        metavar="PART=COLUMN",
        help="which column is `prompt`, `answer` (lists too) or `json` (an object as the answer), `image`; once for "
        "each; a.b for nested ones, 'scans/{a.b}.png' for a text with fields in it",
    )
    parser.add_argument(
        "--question", help="of all rows, with --map answer=COLUMN and none for `prompt`, or --format of annotations"
    )
    parser.add_argument("--keep_image_tag", action="store_true", help="take <image> for text in rows without an image")
    parser.add_argument(
        "--images_dir", type=Path, help="folder that IN's image paths are relative to (default: its own)"
    )
    parser.add_argument("--split", type=float, metavar="SHARE", help="this share for training, the others for testing")
    parser.add_argument("--seed", type=int, help="of the split (default: 0)")
    parser.add_argument("--group", metavar="FIELD", help="rows with the same FIELD stay on one side of the split")
    parser.add_argument(
        "--where", action="append", metavar="FIELD=VALUE", help="keep only rows with this value; a.b for nested fields"
    )
    parser.add_argument("--limit", type=int, help="write only the first LIMIT records (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args()
    for name in ("map", "where"):
        pairs = [pair.partition("=") for pair in getattr(args, name) or []]
        if not all(field and equals for field, equals, _ in pairs):
            parser.error(f"--{name} takes NAME=VALUE")
        setattr(args, name, [(field, value) for field, _, value in pairs])
    args.columns = dict(args.map) or None
    if len(args.columns or {}) < len(args.map):
        parser.error("--map takes each part once")
    if args.format in ANNOTATIONS:
        if args.columns or not args.question:
            parser.error(f"--format {args.format} needs --question, and takes no --map")
        args.columns = {"answer": "answer", "image": "image"}
    answer = "json" if "json" in (args.columns or {}) else "answer"
    needed = {answer} if args.question else {"prompt", answer}
    if (args.columns or args.question) and not needed <= (args.columns or {}).keys() <= {*needed, "image"}:
        given = "--question" if args.question else "--map"
        maps = " and ".join(f"--map {name}=COLUMN" for name in sorted(needed))
        parser.error(f"{given} needs {maps}, and takes --map image=COLUMN beside")
    if args.columns and args.format not in ("auto", "columns", *ANNOTATIONS):
        parser.error(f"--map has no effect with --format {args.format}")
    if args.split is not None and not 0 < args.split < 1:
        parser.error(f"--split {args.split:g}: must be a share between 0 and 1")
    if args.split is None and (args.seed is not None or args.group):
        parser.error("--seed and --group have no effect without --split")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: must be at least 1")
    return args


def find_targets(args: argparse.Namespace) -> list[Path]:
    """The files to write, which must be none that is there."""
    names = [f"{args.output.stem}.{part}.jsonl" for part in ("train", "test")]
    targets = [args.output] if args.split is None else [args.output.with_name(name) for name in names]
    for target in map(check_target, targets):
        if target.exists() and target.samefile(args.input):
            raise UserError(f"{target}: is the input itself; give another file")
        if target.exists() and not args.overwrite:
            raise UserError(f"{target}: is there already; give another file, or --overwrite")
    return targets


def has_value(row: JsonObject, field: str, value: str) -> bool:
    """Whether a field, a.b for nested ones, has a value as the command line spells it."""
    found = look_up(row, field)
    return found == value if isinstance(found, str) else found is not None and json.dumps(found) == value


def find_format(path: Path, rows: list[tuple[int, JsonObject]], columns: dict[str, str] | None) -> str:
    """The format that all of the first rows may have; those of no known format are reported later, by line.

    Raises:
        UserError: if there is none.
    """
    left: list[str] = []
    for line, row in rows:
        possible = possible_formats(row, columns)
        both = [form for form in left if form in possible]
        if left and not both:
            check_format(path, line, possible, left[0])
        left = both or left or possible
    if not left:
        try:
            refuse_unread(rows[0][1])
        except ValueError as error:
            raise UserError(f"{path}:{rows[0][0]}: {error}") from None
        names = ", ".join(list(rows[0][1])[:8])
        raise UserError(
            f"{path}:{rows[0][0]}: a row of no known format, with the fields {names}; {how_to_map(rows[0][1])}"
        )
    return left[0]


def check_format(path: Path, line: int, possible: list[str], form: str) -> None:
    """Raises UserError if a row is of another known format than the file's."""
    if possible and form not in possible:
        raise UserError(
            f"{path}:{line}: a row of format {possible[0]} among rows of format {form}; put them into files of their "
            f"own, or say --format {form} to leave such rows out"
        )


def page_keys(record: JsonObject, images: list[str], hashes: dict[str, str]) -> list[str]:
    """What makes a record show the same page as another: its images' contents, without images its messages.

    Raises:
        ValueError: if an image cannot be read.
    """
    for image in images:
        if image not in hashes:
            try:
                hashes[image] = fingerprint(image)
            except FileNotFoundError:
                raise ValueError(f"image {image} does not exist, and --split compares the pages") from None
            except OSError as error:
                raise ValueError(f"image {image} cannot be read: {error.strerror}") from None
    asked = hash_json(record.get("messages", record.get("text")))
    return [hashes[image] for image in images] or [f"asked {asked}"]


def group_key(row: JsonObject, group: str | None) -> list[str]:
    """The value that --group keeps together; raises ValueError if a row has none."""
    if group is None:
        return []
    value = look_up(row, group)
    if value is None:
        raise ValueError(f"no `{group}`, which --group goes by")
    return [f"group {json.dumps(value, sort_keys=True)}"]


def is_folder_of_json(path: Path) -> bool:
    """Whether IN is a folder with one JSON file per page, and no table."""
    return path.is_dir() and not is_table(path)


class Rows:
    """The wanted rows of a file, read one by one.

    Attributes:
        unreadable: lines that hold no row.
        total: rows of the file, blank lines among them.
        count: rows that were read.
        unwanted: how many of them --where leaves out.
    """

    def __init__(self, path: Path, images_dir: Path, where: list[tuple[str, str]]):
        self.unreadable: list[RecordError] = []
        self.count = self.unwanted = 0
        self._where = where
        source = JsonFolder(path) if is_folder_of_json(path) else RowSource(path, images_dir)
        self.total = source.count()
        self._rows = read_objects(source, self.unreadable)

    @property
    def seen(self) -> int:
        """How many rows were read, good and bad."""
        return self.count + len(self.unreadable)

    def __iter__(self) -> Iterator[tuple[int, JsonObject]]:
        for number, row in self._rows:
            self.count += 1
            if all(has_value(row, field, value) for field, value in self._where):
                yield number, without_known_nulls(row)
            else:
                self.unwanted += 1


class Reasons:
    """Why rows or fields were left out, counted by reason."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[str, list[int]]] = {}

    def add(self, reason: str, line: int) -> None:
        """Count one; what differs from row to row, numbers and names in quotes or paths, makes no other reason."""
        kind = re.sub(r"\d+|'[^']*'|\S*/\S*", "…", reason)
        self._lines.setdefault(kind, (reason, []))[1].append(line)

    def count(self) -> int:
        return sum(len(lines) for _, lines in self._lines.values())

    def print(self) -> None:
        """The commonest reason first, each in the words of its first row."""
        for reason, lines in sorted(self._lines.values(), key=lambda found: -len(found[1])):
            shown = ", ".join(map(str, lines[:LINES_SHOWN])) + (", …" if len(lines) > LINES_SHOWN else "")
            print(f"  {len(lines)} × {reason} (row{'s' if len(lines) > 1 else ''} {shown})")

    def first(self) -> str:
        reason, lines = next(iter(self._lines.values()))
        return f"{lines[0]}: {reason}"


def main() -> None:
    # 1. Arguments, and where to write.
    args = parse_arguments()
    keep_image_tag(args.keep_image_tag)
    images_dir, output_dir = args.images_dir or args.input.parent, args.output.parent
    foreign: ForeignSet | None = None
    if is_folder_of_json(args.input) and (args.input / INFO).is_file():
        args.input, images_dir = args.input / INFO, args.images_dir or args.input
    if args.format == "llama_factory" or (args.format == "auto" and split_name(args.input)[0].name == INFO):
        foreign = find_set(args.input)
        args.input, args.format = foreign.path, "llama_factory"
    if not is_folder_of_json(args.input):
        data_files(args.input)
    targets = find_targets(args)
    if not images_dir.is_dir():
        raise UserError(f"{images_dir}: no such folder of images; give it with --images_dir")
    same_folder = images_dir.resolve() == output_dir.resolve()

    # 2. The wanted rows, and their format.
    rows = Rows(args.input, images_dir, args.where)
    wanted = iter(rows)
    first = list(itertools.islice(wanted, FIRST_ROWS))
    if not first:
        where = ", ".join(f"{field}={value}" for field, value in args.where)
        why = f" with {where}" if rows.unwanted else f"; {rows.unreadable[0]}" if rows.unreadable else ""
        raise UserError(f"{args.input}: holds no row{why}")
    form = find_format(args.input, first, args.columns) if args.format == "auto" else args.format
    print(f"{args.input}: rows of format {form}{', by its first rows' if args.format == 'auto' else ''}")

    # 3. Record by record. The files get their names at the end, if nothing went wrong.
    dropped, fields, splitter = Reasons(), Reasons(), Splitter()
    hashes: dict[str, str] = {}
    split, relative, written, sizes = args.split is not None, False, 0, []
    with contextlib.ExitStack() as files:
        embedded = files.enter_context(ImageFolder(output_dir / f"{args.output.stem}-images"))
        outputs = [files.enter_context(atomic_write(target)) for target in targets]
        # Which side of a split a record goes to is known when all are read.
        spool = outputs[0]
        if split:
            spool = files.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", dir=output_dir))
        progress = Progress("converting", rows.total, "row")
        files.callback(progress.close)
        for line, row in itertools.chain(first, wanted):
            progress.update(line - progress.done)
            if args.format == "auto":
                check_format(args.input, line, possible_formats(row, args.columns), form)
            images_before = embedded.count
            try:
                if foreign:
                    row, form = foreign.row(row), foreign.form
                elif form in ANNOTATIONS:
                    row = ANNOTATIONS[form](row)
                record, left_out = convert(row, "columns" if form in ANNOTATIONS else form, args.columns, args.question)
                messages = record.get("messages", [])
                record = {"id": f"{args.input.stem}-{line}"} | record
                taken = embedded.take(messages)
                check_record(record)
                images = image_blocks(messages)
                if split:
                    paths = [resolve(image, output_dir if image in taken else images_dir) for image in images]
                    splitter.add(page_keys(record, paths, hashes) + group_key(row, args.group))
            except ValueError as error:
                dropped.add(str(error), line)
                embedded.remove_from(images_before)
                continue
            relative |= any(not Path(image).is_absolute() for image in images if image not in taken)
            if relative and embedded.used and not same_folder:
                raise UserError(
                    f"{args.input}:{line}: images come as files and within the rows; write OUT into {images_dir}, "
                    "so that one folder holds both"
                )
            for field in left_out:
                fields.add(f"`{field}`, a name that records use", line)
            spool.write(json.dumps(record, ensure_ascii=False) + "\n")
            written += 1
            if written == args.limit:
                break
        for fault in rows.unreadable:
            dropped.add(fault.reason, fault.line)
        if not written:
            raise UserError(f"{args.input}: nothing to write, all rows were left out; row {dropped.first()}")

        # 4. The two sides of the split.
        if split:
            sides = splitter.divide(args.split, args.seed or 0)
            if len(set(sides)) == 1:
                raise UserError(f"{args.input}: the {written} records cannot be split: they share pages or groups")
            spool.seek(0)
            for line, to_train in zip(spool, sides, strict=True):
                outputs[not to_train].write(line)
            sizes = [sum(sides), written - sum(sides)]

    # 5. What became of the rows.
    left = f", {rows.unwanted} left out by --where" if rows.unwanted else ""
    left += ", the rest by --limit" if written == args.limit else ""
    print(f"{rows.seen} rows read, {written} written, {dropped.count()} dropped{left}")
    dropped.print()
    if fields.count():
        print("Fields left out:")
        fields.print()
    for target, size in zip(targets, sizes or [written], strict=True):
        print(f"{size} records in {target}")
    if embedded.used:
        print(f"Images in {embedded.folder}")
    if relative and not same_folder:
        print(f"Image paths are relative to {images_dir}: give train and predict --images_dir {images_dir}")


if __name__ == "__main__":
    run_step(main)
