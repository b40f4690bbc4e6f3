"""The validator's report: what is in data files and what is wrong with them, as one page without scripts."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from mistral_ft import plots
from mistral_ft.data.image_fitter import ImageFitter
from mistral_ft.data.pages import open_image
from mistral_ft.data.records import Record, checked
from mistral_ft.data.references import is_data_url
from mistral_ft.data.rows import RowSource, parse_line
from mistral_ft.html import templates
from mistral_ft.validation.checker import Kind, Source
from mistral_ft.validation.tally import Examples, Tally

MOST_THUMBNAILS = 48
THUMBNAIL = (220, 280)  # pixels, at most


def report(tally: Tally, examples: Examples, training: Sequence[str], fitter: ImageFitter | None) -> str:
    """The page, as HTML.

    Args:
        tally: of all rows, each compared with the others.
        training: lines about what fits on the card and how long an epoch takes.
        fitter: of the model, which pages are opened for.
    """
    counted = tally.tokens[tally.tokens[:, 0] > 0]
    kinds = sorted(tally.counts, key=lambda kind: (not kind.fatal, -tally.counts[kind]))
    return (
        templates()
        .get_template("validation.html.jinja")
        .render(
            files=[(str(source.path), source.is_eval) for source in tally.sources],
            tally=tally,
            summary=list(tally.summary(fitter)),
            training=training,
            plots=[
                Markup(plots.histogram(column.tolist(), title))
                for title, column in zip(("Prompt, without images", "Images", "Answer"), counted.T, strict=True)
                if len(counted) and column.any()
            ],
            longest=tally.longest(20),
            problems=[(kind, tally.counts[kind], examples.found[kind]) for kind in kinds],
            thumbnails=_thumbnails(tally.sources, examples, kinds, fitter),
        )
    )


def _thumbnails(
    sources: Sequence[Source], examples: Examples, kinds: Sequence[Kind], fitter: ImageFitter | None
) -> dict[str, list[dict[str, str]]]:
    """Pages of the rows that have problems, by place: {"name", "image": data URL}; those that can be opened."""
    asked = {place: problem for kind in kinds for place, problem in examples.found[kind]}
    found: dict[str, list[dict[str, str]]] = {}
    left = MOST_THUMBNAILS
    for source in sources:
        if not any(place.startswith(f"{source.path}:") for place in asked):
            continue
        for line, raw in RowSource(source.path, source.images_dir):
            problem = asked.get(f"{source.path}:{line}")
            if problem is None or left == 0:
                continue
            try:
                data = checked(parse_line(raw, first=line == 1) or {})
            except ValueError:
                continue
            paths = Record(source.path, line, data, source.images_dir).image_paths
            # The page that the problem is about, if it names one.
            paths = [path for path in paths if Path(path).name in problem.text] or paths[:1]
            if shown := [page for path in paths[:left] if (page := _thumbnail(path, fitter))]:
                found[f"{source.path}:{line}"] = shown
                left -= len(shown)
    return found


def _thumbnail(path: str, fitter: ImageFitter | None) -> dict[str, str] | None:
    try:
        image = open_image(path, fitter)
    except ValueError:
        return None
    image.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70)
    name = "embedded image" if is_data_url(path) else Path(path).name
    return {"name": name, "image": f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"}
