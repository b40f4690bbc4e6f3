"""Annotations of pages: folders with one JSON file per page, FUNSD's forms and Label Studio's tasks.

What is annotated becomes one JSON object, the answer; the question is the user's.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from mistral_ft.data.conversation import to_json
from mistral_ft.data.foreign.file_kinds import to_utf8
from mistral_ft.data.rows import RowSource
from mistral_ft.errors import UserError
from mistral_ft.files import Json, JsonObject


class JsonFolder(RowSource):
    """The JSON files of a folder (.json, or .txt as SROIE has them) as rows: {"file", "stem", "json": what it holds}.

    Iterated over, it gives (number from 1, JSON) as `rows.RowSource` does; UserError names a file that is no JSON.
    """

    def __init__(self, folder: Path):
        super().__init__(folder, folder.parent)
        self._files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt"))
        if not self._files:
            rows = next((path for kind in ("*.jsonl", "*.csv") for path in sorted(folder.glob(kind))), "a file of rows")
            raise UserError(f"{folder}: is a folder without a .json file for each page in it; give {rows}")

    def count(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for number, path in enumerate(self._files, 1):
            try:
                data = json.loads(path.read_text(encoding="utf-8-sig"))
            except UnicodeDecodeError:
                raise UserError(f"{path}: not UTF-8 text; {to_utf8(path)}") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: not JSON: {error}") from None
            yield number, json.dumps({"file": path.name, "stem": path.stem, "json": data}).encode()


def funsd_row(row: JsonObject) -> JsonObject:
    """A file of FUNSD's `annotations/` as a row: answers by question, a list where there are several.

    Raises:
        ValueError: if it is none, or a question stands there twice.
    """
    form = row["json"].get("form") if isinstance(row.get("json"), dict) else None
    if not isinstance(form, list) or not all(isinstance(b, dict) and {"id", "label", "text"} <= b.keys() for b in form):
        raise ValueError("no `form` of blocks with `id`, `label`, `text` and `linking`")
    blocks = {block["id"]: block for block in form}
    pairs: dict[str, list[str]] = {}
    for question in (block for block in form if block["label"] == "question"):
        linked = [
            blocks.get(other) for link in question.get("linking") or [] for other in link if other != question["id"]
        ]
        if question["text"] in pairs:
            raise ValueError(f"the question {question['text'][:60]!r} stands there twice")
        pairs[question["text"]] = [block["text"] for block in linked if block and block["label"] == "answer"]
    if not pairs:
        raise ValueError("no question in its `form`")
    answers = {name: texts[0] if len(texts) == 1 else texts or None for name, texts in pairs.items()}
    return {"id": row["stem"], "answer": to_json(answers), "image": f"images/{row['stem']}.png"}


def label_studio_row(row: JsonObject) -> JsonObject:
    """A task of Label Studio's JSON export as a row: of each control its text or choice, of each region its label's.

    Raises:
        ValueError: if the task is no page, or is annotated otherwise than by one person in texts and choices.
    """
    data = row.get("data")
    images = [data[name] for name in ("image", "ocr") if data.get(name)] if isinstance(data, dict) else []
    if not images or not isinstance(images[0], str):
        raise ValueError("no `data.image` or `data.ocr`: the page of the task")
    done = [a for a in row.get("annotations") or [] if isinstance(a, dict) and not a.get("was_cancelled")]
    if len(done) != 1:
        raise ValueError(f"number of annotations: {len(done)}; expected one")
    regions: dict[str, JsonObject] = {}
    answer: JsonObject = {}
    for result in done[0].get("result") or []:
        kind, value = result.get("type"), result.get("value")
        if kind not in ("textarea", "choices", "rectanglelabels", "rectangle") or not isinstance(value, dict):
            raise ValueError(f"a result of type {kind!r}; only texts, choices and rectangles with texts are read")
        if kind in ("rectanglelabels", "rectangle") or "width" in value:
            regions.setdefault(result.get("id"), {}).update({kind: value.get("text" if kind == "textarea" else kind)})
        else:
            _add(answer, result.get("from_name"), value.get("text" if kind == "textarea" else kind))
    for region in regions.values():
        labels = region.get("rectanglelabels") or region.get("choices")
        if not labels or len(labels) != 1 or not region.get("textarea"):
            raise ValueError("a rectangle without one label and a text, and boxes are not learned")
        _add(answer, labels[0], region["textarea"])
    if not answer:
        raise ValueError("its annotation is empty")
    return {"id": row.get("id"), "answer": to_json(answer), "image": _page_path(images[0])}


def _add(answer: JsonObject, name: Json, value: Json) -> None:
    """Put texts under a name; several become a list."""
    found = value if isinstance(value, list) else [value]
    if not isinstance(name, str) or not found or not all(isinstance(text, str) for text in found):
        raise ValueError(f"`{name}` has no text")
    before = answer.get(name, [])
    texts = [*(before if isinstance(before, list) else [before]), *found]
    answer[name] = texts[0] if len(texts) == 1 else texts


def _page_path(url: str) -> str:
    """Label Studio's own addresses of a page as paths: below the folder of its local storage, or its media folder."""
    if local := re.fullmatch(r"/data/local-files/\?d=(.+)", url):
        return unquote(local[1])
    return unquote(url.removeprefix("/data/")) if url.startswith("/data/upload/") else url


ANNOTATIONS = {"funsd": funsd_row, "label_studio": label_studio_row}
