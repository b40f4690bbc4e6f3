"""The review server's pages and answers: JSON for ui/, which shows it.

What a record holds goes out as text, numbers too, so that none is rounded or unknown to JSON, and the page puts it in
as text, never as HTML. Nothing a request says becomes a path: images are named by row and number.
"""

import asyncio
import contextlib
import json
import traceback
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import anyio
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mistral_ft.data.json_fields import has_half
from mistral_ft.data.pages import page_sizes
from mistral_ft.data.row_keys import expected_of
from mistral_ft.files import Json, JsonObject
from mistral_ft.html import visible
from mistral_ft.review.desk import Desk, run_jobs
from mistral_ft.review.export import export
from mistral_ft.review.index import COMPUTED, EDITED, FAILED, FLAGGED, HIT, REVIEWED, SCORED
from mistral_ft.review.log import Outdated, Review
from mistral_ft.review.page_files import MOST_PAGES, find_page, render_page
from mistral_ft.review.requests import body_of, int_of, query_of
from mistral_ft.review.runs import read_plot, recent_runs
from mistral_ft.review.scores import score_rows
from mistral_ft.review.shown import (
    LONGEST_SHOWN,
    answers_of,
    confidences_of,
    diffs,
    image_names,
    json_fields_of,
    label,
    listed,
    metrics_of,
    number_of,
    problem_of,
    shown,
    shown_message,
    snippet,
    text_of,
)
from mistral_ft.review.tokens import TokenView
from mistral_ft.scoring.metrics import answer_of
from mistral_ft.scoring.mistakes import KINDS

UI = Path(__file__).parents[2] / "ui"
MOST_ROWS = 200  # per request
MOST_VALUES = 500  # of a field that are offered as filters
MOST_VIEWS = 16  # lists that are kept, 4 bytes a row
SCORED_HERE = 2_000  # rows; more are scored by another process


class Answer(JSONResponse):
    """JSON; bytes of file names that are no UTF-8 become its escapes."""

    def render(self, content: Json) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")


class ReviewApp:
    """The endpoints over one desk.

    Args:
        images_dir: the folder of the images.
        tokens: for the token view.
        runs_dir: the folder of the training runs that are shown; None: none are.
    """

    def __init__(self, desk: Desk, images_dir: Path, tokens: TokenView, runs_dir: Path | None = None):
        self.desk, self.images_dir, self.tokens, self.runs_dir = desk, images_dir, tokens, runs_dir
        self.views: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()  # (generation, row numbers)
        self.last_view = 0
        self.reading = anyio.CapacityLimiter(100)  # threads of their own: pages may be waited for, and nothing else

    def starlette(self) -> Starlette:
        """The ASGI application."""

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            await self.desk.begin()
            following = asyncio.create_task(self.desk.follow())
            following.add_done_callback(report)
            yield
            following.cancel()

        get = {name: getattr(self, name) for name in (
            "status", "view", "rows", "row", "place", "step", "find", "fields", "bad_lines", "images", "image",
            "scores", "token_view", "runs", "plot",
        )}  # fmt: skip
        return Starlette(
            routes=[
                Route("/", lambda request: FileResponse(UI / "index.html")),
                Mount("/ui", StaticFiles(directory=UI)),
                *(Route(f"/api/{name}", endpoint) for name, endpoint in get.items()),
                Route("/api/review", self.review, methods=["POST"]),
                Route("/api/export", self.export, methods=["POST"]),
            ],
            lifespan=lifespan,
            exception_handlers={
                HTTPException: lambda request, error: Answer({"error": error.detail}, error.status_code),
                ClientDisconnect: lambda request, error: Response(status_code=400),  # nobody is there to read it
                # What is wrong with a file or a record, in one line.
                RecursionError: lambda request, error: Answer({"error": "nested too deeply to be shown"}, 422),
                ValueError: lambda request, error: Answer({"error": str(error)}, 422),
                OSError: lambda request, error: Answer({"error": f"not saved: {error.strerror}"}, 507),
            },
        )

    # Lists.

    async def status(self, request: Request) -> Response:
        """What the page asks for every second or two."""
        index, log = self.desk.index, self.desk.log
        states = index.rows["state"]
        return Answer({
            "file": index.path.name, "images_dir": str(self.images_dir), "generation": index.generation,
            "rows": index.count, "ready": self.desk.ready, "unfinished": index.unfinished,
            "read": index.end / index.size if index.size else 1, "predicted": index.predicted,
            "bad_lines": index.bad_count + (index.tail is not None), "revision": log.revision,
            "reviewed": int(np.count_nonzero(states & REVIEWED)), "edited": int(np.count_nonzero(states & EDITED)),
            "flagged": int(np.count_nonzero(states & FLAGGED)),
            "other": self.desk.other.path.name if self.desk.other else None, "model": self.tokens.model,
            "runs": self.runs_dir is not None,
        })  # fmt: skip

    async def view(self, request: Request) -> Response:
        """Make a list: it stays as it is while its rows are worked on."""
        rows = self.desk.select(query_of(request))
        self.last_view += 1
        self.views[self.last_view] = self.desk.index.generation, rows
        if len(self.views) > MOST_VIEWS:
            self.views.popitem(last=False)
        first = [self._summary(int(row)) for row in rows[: int_of(request, "count", 50, MOST_ROWS)]]
        return Answer({"view": self.last_view, "generation": self.desk.index.generation, "total": len(rows),
                       "first": first})  # fmt: skip

    async def rows(self, request: Request) -> Response:
        """A stretch of a list."""
        start, count = int_of(request, "start", 0), int_of(request, "count", 50, MOST_ROWS)
        return Answer({"rows": [self._summary(int(row)) for row in self._view(request)[start : start + count]]})

    async def place(self, request: Request) -> Response:
        """Where in a list a row is."""
        places = np.flatnonzero(self._view(request) == self._row(request))
        return Answer({"place": int(places[0]) if len(places) else None})

    async def step(self, request: Request) -> Response:
        """The next place in a list, from one on, whose row is wrong or (what=unreviewed) not reviewed."""
        rows = self._view(request)
        states = self.desk.index.rows["state"][rows]
        if request.query_params.get("what") == "unreviewed":
            fits = states & REVIEWED == 0
        else:
            fits = (states & (SCORED | HIT) == SCORED) & self.desk.index.predicted
        start, backwards = int_of(request, "from", 0), "backwards" in request.query_params
        places = np.flatnonzero(fits[:start] if backwards else fits[start:])
        if not len(places):
            return Answer({"place": None})
        return Answer({"place": int(places[-1] if backwards else places[0] + start)})

    async def find(self, request: Request) -> Response:
        """The row with an id, or on a line."""
        if (line := request.query_params.get("line", "")).isdecimal():
            found = np.flatnonzero(self.desk.index.rows["line"] == int(line[:12]))
            return Answer({"row": int(found[0]) if len(found) else None})
        return Answer({"row": self.desk.find(request.query_params.get("id", ""))})

    async def fields(self, request: Request) -> Response:
        """The fields that rows can be filtered by, with their commonest values."""
        found = []
        for name, column in self.desk.index.columns.items():
            if name == "mistake" and not self.desk.index.predicted:
                continue
            counts = np.bincount(np.frombuffer(column.codes, np.intc), minlength=len(column.values))
            values = list(column.values)
            best = [int(code) for code in np.argsort(-counts, kind="stable")[:MOST_VALUES] if counts[code]]
            found.append({
                "name": name, "title": COMPUTED.get(name, name), "too_many": column.too_many,
                "values": [[values[code], int(counts[code])] for code in best], "distinct": len(values) - 1,
            })  # fmt: skip
        return Answer({"fields": found, "mistakes": KINDS})

    async def bad_lines(self, request: Request) -> Response:
        """Lines that are no record, and why."""
        index = self.desk.index
        tail = [(index.lines + 1, index.tail)] if index.tail else []
        return Answer({"count": index.bad_count + len(tail), "lines": [*index.bad, *tail]})

    # One row.

    async def row(self, request: Request) -> Response:
        """All of a row."""
        return Answer(self._describe(self._row(request)))

    async def images(self, request: Request) -> Response:
        """The pages of a row's images: [{"name", "pages": [[width, height], …]} or {"name", "error"}, …]."""
        names = image_names(self.desk.index.read(self._row(request)))

        def describe(name: str) -> JsonObject:
            try:
                return {"name": label(name), "pages": page_sizes(find_page(self.images_dir, name), MOST_PAGES)}
            except ValueError as error:
                return {"name": label(name), "error": str(error)}

        found = [await anyio.to_thread.run_sync(describe, name, limiter=self.reading) for name in names]
        return Answer({"images": found})

    async def image(self, request: Request) -> Response:
        """One page of one of a row's images."""
        names = image_names(self.desk.index.read(self._row(request)))
        number, page = int_of(request, "image", 0), int_of(request, "page", 0)
        if number >= len(names):
            raise HTTPException(404, "the row has no such image")
        reference = find_page(self.images_dir, names[number])
        data, kind = await anyio.to_thread.run_sync(render_page, reference, page, limiter=self.reading)
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=300"})

    async def token_view(self, request: Request) -> Response:
        """The tokens that a row becomes."""
        row = self.desk.read(self._row(request))
        tokens = self.tokens.tokens
        return Answer(await anyio.to_thread.run_sync(tokens, row, self.images_dir, limiter=self.reading))

    # Decisions.

    async def review(self, request: Request) -> Response:
        """Save a decision: {"generation", "row", "version", "expected", "reviewed", "flagged"}."""
        data = await body_of(request)
        expected = data.get("expected")
        types = {"generation": int, "row": int, "version": int, "reviewed": bool, "flagged": bool}
        if any(type(data.get(name)) is not kind for name, kind in types.items()):
            raise HTTPException(400, "a review needs " + ", ".join(types))
        if not isinstance(expected, str | None) or has_half(expected or ""):
            raise HTTPException(400, "`expected` must be text or null")
        if data["generation"] != self.desk.index.generation:
            raise HTTPException(409, "the file was replaced in the meantime; reload the page")
        row: int = data["row"]
        if not 0 <= row < self.desk.index.count:
            raise HTTPException(404, "there is no such row")
        try:
            self.desk.save(row, Review(data["version"], expected, data["reviewed"], data["flagged"]))
        except Outdated:
            error = "this row was changed in another tab or window; nothing was overwritten"
            return Answer({"error": error, "row": self._describe(row)}, 409)
        revision = self.desk.log.revision
        return Answer({"row": self._describe(row), "summary": self._summary(row), "revision": revision})

    async def export(self, request: Request) -> Response:
        """Write the corrected data set beside the file."""
        await body_of(request)
        path = self.desk.index.wanted
        target = path.with_name(f"{path.name.removesuffix('.jsonl')}.corrected.jsonl")
        done = await asyncio.to_thread(export, path, target)
        left_out = [visible(text, 300) for text in done.left_out[:100]]
        more = {"path": str(done.path), "left_out": left_out, "left_out_count": len(done.left_out)}
        return Answer(asdict(done) | more)

    async def scores(self, request: Request) -> Response:
        """What `score` says of the rows of a list, with the corrections."""
        desk, rows = self.desk, self._view(request)
        if not desk.index.predicted:
            raise ValueError("this file holds no predictions, so there is nothing to score")
        entries = desk.index.rows[rows]
        corrected = {
            int(desk.index.rows["offset"][row]): desk.review_of(int(row))
            for row in rows[(entries["state"] & EDITED) > 0]
        }
        other_path, other_places = None, []
        if desk.other is not None:
            at = desk.other_rows[rows]
            other_path = desk.other.path
            other_places = [(0, 0, 0) if k < 0 else desk.other.rows[k][["offset", "length", "line"]].item() for k in at]
        places = entries[["offset", "length", "line"]].tolist()
        by = request.query_params.get("by") or None
        job = (desk.index.path, places, corrected, other_path, other_places, by, self.images_dir)
        results = [result async for result in run_jobs(score_rows, [job], elsewhere=len(rows) > SCORED_HERE)]
        return Answer(results[0] | {"corrected": len(corrected)})

    # Training runs.

    async def runs(self, request: Request) -> Response:
        """What the runs do that are at work, or ended lately."""
        runs = await asyncio.to_thread(recent_runs, self.runs_dir) if self.runs_dir else []
        return Answer({"runs": runs})

    async def plot(self, request: Request) -> Response:
        """The loss curve of one of them."""
        if self.runs_dir is None:
            raise HTTPException(404, "no runs are shown here")
        data = await asyncio.to_thread(read_plot, self.runs_dir, request.query_params.get("run", ""))
        # In an <img> it runs nothing; opened by itself, it would be a page of this server.
        return Response(data, media_type="image/svg+xml", headers={"Content-Disposition": "attachment"})

    # Helpers.

    def _view(self, request: Request) -> np.ndarray:
        number = int_of(request, "view", 0)
        generation, rows = self.views.get(number, (0, np.zeros(0)))
        if generation != self.desk.index.generation:  # which counts from 1
            raise HTTPException(410, "this list is no longer kept")
        self.views.move_to_end(number)
        return rows

    def _row(self, request: Request) -> int:
        row = int_of(request, "row", -1)
        if not 0 <= row < self.desk.index.count:
            raise HTTPException(404, "there is no such row")
        return row

    def _summary(self, row: int) -> JsonObject:
        """What the list shows of a row."""
        entry = self.desk.index.rows[row]
        data = self.desk.read(row)
        return {
            "row": row, "line": int(entry["line"]), "id": text_of(data.get("id")), **self._state(row),
            "expected": snippet(_first_of(data)), "actual": snippet(answer_of(data)),
            "error": snippet(data.get("error")), "confidence": number_of(entry["confidence"]),
            "cer": number_of(entry["cer"]) if self.desk.index.predicted else None, "images": len(image_names(data)),
        }  # fmt: skip

    def _state(self, row: int) -> JsonObject:
        entry, predicted = self.desk.index.rows[row], self.desk.index.predicted
        state = int(entry["state"])
        right = bool(state & HIT) if state & SCORED and predicted else None
        other = int(entry["other_hit"])
        return {
            "right": right, "failed": bool(state & FAILED), "reviewed": bool(state & REVIEWED),
            "edited": bool(state & EDITED), "flagged": bool(state & FLAGGED),
            "change": "fixed" if right and other == 0 else "broken" if right is False and other == 1 else None,
        }  # fmt: skip

    def _describe(self, row: int) -> JsonObject:
        desk = self.desk
        source, review = desk.index.read(row), desk.review_of(row)
        data = review.apply(source)
        expected, actual = _first_of(data), answer_of(data)
        other = desk.read_other(row)
        return {
            "row": row, "key": desk.index.name_of(row), "generation": desk.index.generation,
            "line": int(desk.index.rows["line"][row]),
            "id": text_of(data.get("id")), **self._state(row), "review": asdict(review),
            "messages": [shown_message(message) for message in listed(data.get("messages"))],
            "images": [label(name) for name in image_names(data)],
            "expected": shown(expected), "source_expected": shown(_first_of(source)),
            "others": [shown(answer) for answer in answers_of(data)[1:]],
            # What is shown in part, or is no text, cannot be edited here.
            "editable": expected is None or (isinstance(expected, str) and len(expected) <= LONGEST_SHOWN),
            "acceptable": actual is not None and len(actual) <= LONGEST_SHOWN,
            "actual": shown(actual), "thinking": shown(data.get("thinking")), "error": shown(data.get("error")),
            "diff": diffs(data),
            "metrics": metrics_of(data) if desk.index.predicted else {},
            "confidence": confidences_of(data), "json_fields": json_fields_of(data),
            "fields": [[name, shown(value)] for name, value in data.items()
                       if name not in ("id", "messages", "expected", "actual", "thinking", "error", "confidence")],
            "problem": problem_of(data),
            "other": other and {
                "actual": shown(answer_of(other)), "thinking": shown(other.get("thinking")),
                "error": shown(other.get("error")),
                "right": {1: True, 0: False}.get(int(desk.index.rows["other_hit"][row])),
                "confidence": confidences_of(other), "diff": diffs(other | {"expected": data.get("expected")}),
                "expects_otherwise": expected_of(other) != expected_of(source),
            },
        }  # fmt: skip


def _first_of(row: JsonObject) -> Json:
    """The first right answer of a row, or what stands in its place."""
    return next(iter(answers_of(row)), row.get("expected"))


def report(task: asyncio.Task) -> None:
    """Print what a task died of."""
    if not task.cancelled() and task.exception():
        traceback.print_exception(task.exception())
