"""The validator's report: what is in data files and what is wrong with them, as one page without scripts."""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from markupsafe import Markup

from mistral_ft import plots
from mistral_ft.data.image_fitter import ImageFitter
from mistral_ft.data.pages import open_image
from mistral_ft.data.records import Record
from mistral_ft.data.references import is_data_url
from mistral_ft.files import JsonObject
from mistral_ft.html import templates
from mistral_ft.validation.checker import Kind, Place, Problem, Source
from mistral_ft.validation.contents import OTHER_ANSWERS, Contents, question_of, read_records
from mistral_ft.validation.folding import Folds
from mistral_ft.validation.tally import Tally

MOST_THUMBNAILS = 48  # of problems
MOST_PAGES = 3  # of a row that is shown
MOST_TABLE_ROWS = 100
MOST_ANSWERS = 15
THUMBNAIL = (220, 280)  # pixels, at most


def report(tally: Tally, folds: Folds, training: Sequence[str], fitter: ImageFitter | None) -> str:
    """The page, as HTML. The files are read again for it.

    Args:
        tally: of all rows, each compared with the others.
        training: lines about what fits on the card and how long an epoch takes.
        fitter: of the model, which pages are opened for.
    """
    kinds = sorted(tally.counts, key=lambda kind: (not kind.fatal, -tally.counts[kind]))
    contents = Contents(tally.sources)
    answers = [
        (key, count) for key, count in contents.answers.most_common(MOST_ANSWERS) if key != OTHER_ANSWERS and count > 1
    ]
    return (
        templates()
        .get_template("validation.html.jinja")
        .render(
            files=[(str(source.path), source.is_eval) for source in tally.sources],
            tally=tally,
            summary=list(tally.summary(fitter)),
            training=training,
            plots=[Markup(plot) for plot in _plots(tally, contents)],
            longest=tally.longest(20),
            problems=[(kind, tally.counts[kind], folds.of_kind[kind]) for kind in kinds],
            thumbnails=_thumbnails(tally.sources, folds, kinds, fitter),
            answers=[(answer, count) for (answer, _), count in answers],
            answered=contents.answers.total(),
            different=len(contents.answers),
            objects=contents.objects,
            fields=contents.fields,
            most_rows=MOST_TABLE_ROWS,
            samples=list(_samples(tally.sources, contents.samples(), fitter)),
        )
    )


def _plots(tally: Tally, contents: Contents) -> Iterator[str]:
    for title, column in zip(("Questions", "Answers"), contents.lengths.T, strict=True):
        if len(column := column[column >= 0]):
            yield plots.histogram(column, title, "characters")
    counted = tally.tokens[tally.tokens[:, 0] > 0]
    for title, column in zip(("Prompt, without images", "Images", "Answer"), counted.T, strict=True):
        if column.any():
            yield plots.histogram(column, title, "tokens")
    if tally.images:
        yield plots.histogram(tally.pages_per_row, "Pages per row", "pages")
        yield plots.page_sizes_plot(tally.page_sizes)


def _thumbnails(
    sources: Sequence[Source], folds: Folds, kinds: Sequence[Kind], fitter: ImageFitter | None
) -> dict[Place, list[JsonObject]]:
    """Pages of the rows that have problems, those that can be opened: {"name", "image": data URL}."""
    asked: dict[Place, Problem] = {}
    for kind in kinds:
        asked |= {place: problem for fold in folds.of_kind[kind] for place, problem in fold.first}
    found: dict[Place, list[JsonObject]] = {}
    left = MOST_THUMBNAILS
    for place, record in _records(sources, asked):
        # The page that the problem is about, if it names one.
        paths = [path for path in record.image_paths if Path(path).name in asked[place].text] or record.image_paths[:1]
        if shown := [page for path in paths[:left] if (page := _thumbnail(path, fitter))]:
            found[place] = shown
            left -= len(shown)
    return found


def _samples(sources: Sequence[Source], asked: dict[Place, str], fitter: ImageFitter | None) -> Iterator[JsonObject]:
    """Rows to show, in the order of the files: where and why, question, answer, and some of the pages."""
    for place, record in _records(sources, asked):
        paths = record.image_paths
        pages = [page for path in paths[:MOST_PAGES] if (page := _thumbnail(path, fitter))]
        yield {
            "place": str(place),
            "why": asked[place],
            "question": question_of(record),
            "answer": record.text if record.expected is None else record.expected,
            "pages": pages,
            "not_shown": len(paths) - len(pages),
        }


def _records(sources: Sequence[Source], asked: Iterable[Place]) -> Iterator[tuple[Place, Record]]:
    """The records at some places."""
    places = list(asked)
    for source in sources:
        if lines := {place.line for place in places if place.file == str(source.path)}:
            for record in read_records(source, lines):
                yield Place(str(source.path), record.line), record


def _thumbnail(path: str, fitter: ImageFitter | None) -> JsonObject | None:
    try:
        image = open_image(path, fitter)
    except ValueError:
        return None
    image.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70)
    name = "embedded image" if is_data_url(path) else Path(path).name
    return {"name": name, "image": f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"}
