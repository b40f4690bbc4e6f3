"""From a reviewed file to a data set that train takes."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from mistral_ft.data.predictions import PREDICTED, find_predictions, partial_of, row_in
from mistral_ft.data.records import Record, check_record, checked
from mistral_ft.data.row_keys import identity_in, identity_of, row_name
from mistral_ft.data.rows import RowSource, read_objects
from mistral_ft.errors import RecordError, UserError
from mistral_ft.files import atomic_write, check_target
from mistral_ft.review.log import Review, log_path, read_log


@dataclass
class Exported:
    """What was written.

    Attributes:
        path: the file.
        count: rows in it; edited, reviewed, flagged: of these.
        left_out: "line: reason" of the rows that train would refuse.
    """

    path: Path
    count: int = 0
    edited: int = 0
    reviewed: int = 0
    flagged: int = 0
    left_out: list[str] = field(default_factory=list)


def export(path: str | os.PathLike, target: str | os.PathLike) -> Exported:
    """Write the records of a file with their corrections, without what predict added to them.

    Rows that train would refuse, such as those without an answer to learn, are left out and named.

    Raises:
        UserError: if there is nothing to write, or `target` is the file or its log.
    """
    source, target, log, found = Path(path), check_target(target), log_path(path), find_predictions(path)
    if target.resolve() in (source.resolve(), log.resolve(), partial_of(source).resolve()):
        raise UserError(f"{target}: is what is reviewed; export to another file")
    reviews = read_log(log)[0] if log.exists() else {}
    wanted, seen = {identity_in(name) for name in reviews}, Counter[int]()
    errors: list[RecordError] = []
    done = Exported(target)
    with atomic_write(target) as file:
        for line, data in read_objects(RowSource(found, source.parent), errors):
            row = row_in(found, data)
            if row is None:
                continue
            review, identity = Review(), identity_of(row)
            if identity in wanted:
                review = reviews.get(row_name(identity, seen[identity]), review)
                seen[identity] += 1
            try:
                data = checked({name: value for name, value in row.items() if name not in PREDICTED})
                # Only a row that is corrected needs its answer apart; in others calls and thinking stay as they are.
                row = data if review.expected is None else Record(source, line, data, source.parent).row
                record = review.apply(row)
                check_record(record, expected_required=True)
            except ValueError as error:
                errors.append(RecordError(source, line, str(error)))
                continue
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            done.count += 1
            done.edited += review.expected is not None
            done.reviewed += review.reviewed
            done.flagged += review.flagged
        done.left_out = [f"{error.line}: {error.reason}" for error in sorted(errors, key=lambda error: error.line)]
        if not done.count:
            why = f", such as line {done.left_out[0]}" if done.left_out else ""
            raise UserError(f"{source}: holds no record that train would take{why}")
    return done
