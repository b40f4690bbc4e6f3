"""The numbers of `score` for some rows of a file, with the reviewer's corrections."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from mistral_ft.data.predictions import PREDICTED, row_in
from mistral_ft.data.records import check_record, image_blocks
from mistral_ft.data.rows import parse_line
from mistral_ft.errors import UserError
from mistral_ft.files import JsonObject
from mistral_ft.review.log import Review
from mistral_ft.review.page_files import find_page
from mistral_ft.review.shown import answers_of
from mistral_ft.scoring.comparison import compare
from mistral_ft.scoring.confidence import KINDS
from mistral_ft.scoring.summary import judge_confidence, summarize
from mistral_ft.scoring.totals import MOST_SLICES, Options, Score

TARGET = 0.99  # as score's own
Place = tuple[int, int, int]  # of a row: offset, length, line


def score_rows(
    path: Path,
    places: Sequence[Place],
    corrected: dict[int, Review],
    other_path: Path | None,
    other_places: Sequence[Place],
    by: str | None,
    images_dir: Path,
) -> JsonObject:
    """Score rows as `score` would score a file of them.

    Args:
        places: of the rows.
        corrected: reviews with a corrected answer, by offset.
        other_path, other_places: their counterparts in another predictions file, in the same order where both have
            the row. They are held against the same expected answers.
        by: the field to slice by, as score's --by; None for none.
        images_dir: folder of the images, for slices by page size.

    Returns:
        What `summary.summarize` returns, without lists of rows. `comparison` is {"error": …} where the files cannot be
        compared.

    Raises:
        UserError: if no row can be scored, or `by` has too many values.
    """
    options = Options(by=by, images_dir=images_dir, keep_pairing=other_path is not None)
    score, expected = Score(), []
    for line, raw, row in _read(path, places, corrected):
        if by == "page_size" and by not in row and not _pages_allowed(row, images_dir):
            row[by] = "page cannot be opened"
        score.add(line, raw, row, options)
        expected.append(row.get("expected"))
        if len(score.slices) > MOST_SLICES:
            raise UserError(f"{by}: more than {MOST_SLICES:,} values")
    if not score.totals.count:
        raise UserError("no row here has an expected answer to score against")
    comparison = None
    if other_path is not None:
        other = Score()
        for (line, raw, row), wanted in zip(_read(other_path, other_places, {}), expected, strict=False):
            if row:
                other.add(line, raw, row | ({} if wanted is None else {"expected": wanted}), options)
        try:
            comparison = asdict(compare(other, score, (other_path.name, path.name)))
            comparison |= {"fixed": len(comparison["fixed"]), "broken": len(comparison["broken"])}
        except UserError as error:
            comparison = {"error": str(error)}
    confidence = judge_confidence(score, KINDS[0], TARGET) if score.confidences else None
    result = summarize(score, by, confidence, None) | ({"comparison": comparison} if comparison else {})
    result["rows"] = {what: len(lines) for what, lines in result["rows"].items()}
    return result


def _pages_allowed(row: JsonObject, images_dir: Path) -> bool:
    """Whether all of a row's images are in their folder: `score` looks wherever a path leads, a server must not."""
    try:
        check_record({name: value for name, value in row.items() if name not in PREDICTED})
        return all(find_page(images_dir, name) for name in image_blocks(row["messages"]))
    except ValueError:
        return False


def _read(path: Path, places: Sequence[Place], corrected: dict[int, Review]) -> Iterator[tuple[int, bytes, JsonObject]]:
    """(line, bytes, row) of each place; an empty row for a place of length 0."""
    handle = os.open(path, os.O_RDONLY)
    try:
        for offset, length, line in places:
            raw = os.pread(handle, length, offset)
            row = row_in(path, parse_line(raw, first=offset == 0)) or {}
            if row and not answers_of(row):
                row = {**row, "expected": None}  # shown as unscored; train and score refuse it
            yield line, raw, corrected[offset].apply(row) if offset in corrected else row
    finally:
        os.close(handle)
