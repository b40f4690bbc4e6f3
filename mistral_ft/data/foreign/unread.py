"""What a row has that no model here would see: it is refused, as the row would be learned in part."""

import re

from mistral_ft.data.references import is_data_url, table_of
from mistral_ft.data.row_images import IMAGE_COLUMNS
from mistral_ft.files import Json, JsonObject

# Fields of rows that are more than a question with pages and its answer, and what they are.
UNREAD = {
    "video": "a video", "videos": "videos", "audio": "a sound", "audios": "sounds",
    "objects": "boxes of objects, which must stand in the text itself",
}  # fmt: skip
PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages")
# Beside a question, the name of a field says that it is a page; beside a text only what it holds.
PAGE_NAME = re.compile(r"ima?ge?s?(_?(id|name|path|file|url)s?)?|page_ids", re.IGNORECASE)
QUESTION = '--question "Read the page." '
SECOND_PAGE = re.compile(r"ima?ge?_?\d+", re.IGNORECASE)
PAGE_FILE = re.compile(r"\S.*(\.(png|jpe?g|tiff?|webp|bmp|gif)|\.pdf#page=[\d-]+)", re.IGNORECASE)


def refuse_unread(row: JsonObject) -> None:
    """Raises ValueError if a row has more than is learned here: it would be learned in part."""
    for name in sorted(row.keys() & UNREAD.keys()):
        boxes = name != "objects" or (isinstance(row[name], dict) and {"bbox", "ref"} & row[name].keys())
        if isinstance(row[name], str | list | dict) and row[name] and boxes:
            raise ValueError(f"has {UNREAD[name]} (`{name}`), which no model here sees; remove it if the rest is whole")
    if row.get("expected") is not None:  # a record, whose other fields are the user's
        return
    if worse := next((n for n in PREFERENCES if isinstance(row.get(n), str | list) and row[n]), None):
        raise ValueError(f"has `{worse}`: rows of preferences are not learned here; keep the better answer alone")
    if wrong := next((name for name in ("label", "kto_tag") if row.get(name) is False), None):
        raise ValueError(f"`{wrong}` is false, so its answer is a bad one (KTO); remove it, or rename a field of yours")
    if "messages" in row and isinstance(row.get("system"), str) and row["system"]:
        raise ValueError("`system` beside `messages` would not be shown: make it their first message, of role system")
    turns = next((row[name] for name in ("messages", "conversations", "instruction") if row.get(name)), "")
    page = next((name for name, value in row.items() if PAGE_NAME.fullmatch(name) and _is_page("", value)), None)
    blocks = isinstance(turns, list) and any(isinstance(t, dict) and isinstance(t.get("content"), list) for t in turns)
    if turns and page and not blocks and not any(row.get(name) for name in IMAGE_COLUMNS):
        raise ValueError(f"`{page}` looks like a page, and nobody would see it: call it `image`, or not like an image")


def refuse_pages(row: JsonObject, columns: dict[str, str]) -> None:
    """Raises ValueError for a page or a context that nobody would see, beside the columns that are read."""
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    if "prompt" in columns and isinstance(row.get("context"), str) and row["context"]:
        prompt = f"'{{context}} {{{columns['prompt']}}}'"
        command = _command(columns | {"prompt": prompt})
        raise ValueError(f"`context` would not be shown; put it into the question: {command}")
    asked = "prompt" in columns
    if asked and (first := next((name for name in IMAGE_COLUMNS if row.get(name)), None)):
        for other, value in rest.items():
            numbered = SECOND_PAGE.fullmatch(other) and _is_page("", value)
            # Bytes in a table alone say little: they may be an embedding.
            if other in IMAGE_COLUMNS or not (numbered or (_holds_page(value) and not table_of(str(value)))):
                continue
            raise ValueError(
                f"`{other}` looks like a page beside `{first}`: put all of them into a list, `images`; if it is none: "
                f"{_command(columns)}"
            )
        return
    column = next((n for n, v in rest.items() if (v and n in IMAGE_COLUMNS) or _is_page(n if asked else "", v)), None)
    if column is None:
        return
    columns = columns | {"image": column}
    if asked:
        raise ValueError(
            f"`{column}` looks like a page, and nobody would see it: {_command(columns)} (leave out the last --map if "
            "it is none)"
        )
    raise ValueError(
        f"has `{column}`, but no question about it; if `{columns['answer']}` is what the page says, this makes records "
        f"of it: {_command(columns, QUESTION)}"
    )


def _command(columns: dict[str, str], flags: str = "") -> str:
    """The command that makes records of rows with these columns."""
    maps = " ".join(f"--map {part}={name}" for part, name in columns.items())
    return f"python -m reformat_data IN OUT {flags}{maps}"


def _is_page(name: str, value: Json) -> bool:
    """Whether a field is likely a page, by what it holds and by its name."""
    first = value[0] if isinstance(value, list) and value else value
    named = isinstance(first, str | int) and first and (PAGE_FILE.fullmatch(str(first)) or PAGE_NAME.fullmatch(name))
    return bool(named) or _holds_page(value)


def _holds_page(value: Json) -> bool:
    """Whether a field holds a page itself, and not its name."""
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        return first.keys() <= {"bytes", "path"} and any(first.values())
    return isinstance(first, str) and bool(is_data_url(first) or table_of(first))
