"""What the review page shows of a record."""

import json
import math

from mistral_ft.data.json_fields import field_name, flatten, parse_answer, written_key
from mistral_ft.data.predictions import PREDICTED
from mistral_ft.data.records import check_record
from mistral_ft.data.references import check_reference, expand, is_data_url
from mistral_ft.data.row_keys import right_answers
from mistral_ft.files import Json, JsonObject
from mistral_ft.scoring.confidence import confidence_of
from mistral_ft.scoring.diff import diff
from mistral_ft.scoring.metrics import answer_of, fields_to_compare, grade, nearest_answer

LONGEST_SHOWN = 100_000  # characters of one text


LONGEST_SNIPPET = 160


def number_of(value: float) -> float | None:
    """A number for JSON."""
    return float(value) if math.isfinite(value) else None


def text_of(value: Json) -> str | None:
    """Any JSON value as text."""
    return value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)


def shown(value: Json) -> str | None:
    """Any JSON value as text that a page can hold."""
    text = text_of(value)
    if text is None or len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:LONGEST_SHOWN]} … ({len(text) - LONGEST_SHOWN:,} more characters)"


def snippet(value: Json) -> str | None:
    """The beginning of a text, in one line."""
    text = text_of(value)
    return None if text is None else " ".join(text[: 2 * LONGEST_SNIPPET].split())[:LONGEST_SNIPPET]


def listed(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []


def answers_of(row: JsonObject) -> list[str]:
    """The right answers of a row that may be malformed, as `right_answers` reads them; none if it is."""
    try:
        return right_answers(row)
    except ValueError:
        return []


def image_names(row: JsonObject) -> list[str]:
    """Every image of a record that may be malformed, one per page."""
    return [
        name
        for message in listed(row.get("messages"))
        if isinstance(message, dict)
        for block in listed(message.get("content"))
        if isinstance(block, dict) and block.get("type") == "image"
        for name in pages_of(text_of(block.get("image")) or "")
    ]


def pages_of(reference: str) -> list[str]:
    """A reference as one per page; as it stands where it is none."""
    try:
        check_reference(reference)
    except ValueError:
        return [reference]
    return expand(reference)


def label(reference: str) -> str:
    """What the page calls an image."""
    return "embedded image" if is_data_url(reference) else reference[:300]


def shown_message(message: Json) -> JsonObject:
    """A message for the page: its role and its blocks, (kind, text); an image's text is its name."""
    if not isinstance(message, dict):
        return {"role": "?", "blocks": [("other", shown(message))]}
    content = message.get("content")
    blocks: list[tuple[str, str | None]] = []
    for block in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in ("text", "image"):
            text = shown(block.get(kind)) or ""
            blocks.append((kind, label(text) if kind == "image" else text))
        elif kind == "thinking":
            parts = listed(block.get("thinking")) or [{"text": block.get("thinking")}]
            text = "".join(text_of(part.get("text")) or "" for part in parts if isinstance(part, dict))
            blocks.append((kind, shown(text)))
        else:
            blocks.append(("other", shown(block)))
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    return {"role": shown(message.get("role")) or "?", "blocks": blocks + ([("other", shown(rest))] if rest else [])}


def diffs(row: JsonObject) -> JsonObject | None:
    """How an answer differs from the nearest right one, by words and by characters, and which of them that is.

    None if there are not two.
    """
    actual, answers = answer_of(row), answers_of(row)
    if not answers or actual is None:
        return None
    nearest = nearest_answer(row)
    if max(len(nearest), len(actual)) > LONGEST_SHOWN:
        return None
    found = {by: diff(nearest.strip(), actual.strip(), by) for by in ("words", "characters")}
    return found | {"nearest": answers.index(nearest)}


def metrics_of(row: JsonObject) -> dict[str, float]:
    """How right a row is, by metric."""
    if not answers_of(row):
        return {}
    graded = grade(row)
    found = {
        "exact": float(graded.hit),
        "normalised": float(graded.folded_hit),
        "cer": graded.char_edits / graded.chars if graded.chars else None,
        "wer": graded.word_edits / graded.words if graded.words else None,
        "anls": graded.anls,
        "token_f1": graded.token_f1,
    }
    return {name: value for name, value in found.items() if value is not None}


def confidences_of(row: JsonObject) -> JsonObject | None:
    """A row's confidences as probabilities, and those of its JSON answer's fields."""
    sure = row.get("confidence")
    if not isinstance(sure, dict):
        return None
    fields: JsonObject = sure["fields"] if isinstance(sure.get("fields"), dict) else {}
    return {kind: confidence_of(row, kind) for kind in ("min", "mean", "sum")} | {
        "tokens": text_of(sure.get("tokens")),
        "fields": {name: confidence_of({"confidence": value}) for name, value in fields.items()},
    }


def json_fields_of(row: JsonObject) -> list[list[Json]] | None:
    """[path, expected, actual, right, confidence] of each field, if the expected answer is JSON."""
    wanted, found = fields_to_compare(row) if answers_of(row) else (None, None)
    if wanted is None:
        return None
    found = found or {}
    sure = (confidences_of(row) or {}).get("fields", {})
    keys: dict[str, str] = {}  # by path: the key at the top, whose confidence it has
    for answer in map(parse_answer, (*answers_of(row), answer_of(row))):
        for key, value in answer.items() if isinstance(answer, dict) else ():
            keys |= dict.fromkeys((path for path, _ in flatten(value, field_name(key))), written_key(key))
    return [
        [path, wanted.get(path), found.get(path), wanted.get(path) == found.get(path), sure.get(keys.get(path))]
        for path in [*wanted, *(path for path in found if path not in wanted)][:1000]
    ]


def problem_of(row: JsonObject) -> str | None:
    """Why train would refuse the record, if it would."""
    try:
        check_record({name: value for name, value in row.items() if name not in PREDICTED})
    except ValueError as error:
        return str(error)
    return None
