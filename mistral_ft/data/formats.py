"""Rows as other toolkits write them, and how they become records.

| format   | a row                                                                          |
|----------|--------------------------------------------------------------------------------|
| native   | {"messages": [...], "expected": ...} or {"text": ...}, as records.py checks it   |
| alpaca   | {"instruction", "input"?, "output", "system"?, "history"?: [[question, answer]]} |
| sharegpt | {"conversations": [{"from": "human" or "gpt", "value"}, ...], "system"?}         |
| llava    | sharegpt with "image" or "images", shown where the text says <image>            |
| openai   | {"messages": [...]} with parts of type image_url, the last one the assistant's  |
| columns  | a prompt and an answer, or a list of right ones, under names of their own   |
| inst     | {"text": "<s>[INST] question [/INST] answer</s>"}                               |

Fields that a format does not use are the user's and stay.
"""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from mistral_ft.data.conversation import Message, with_weights
from mistral_ft.data.foreign.columns import answer_of, json_of, value_of
from mistral_ft.data.foreign.unread import refuse_pages, refuse_unread
from mistral_ft.data.json_fields import read_json
from mistral_ft.data.row_images import IMAGE_COLUMNS, TAG, images_of, place_images, tidy
from mistral_ft.files import Json, JsonObject

COLUMNS = (
    ("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("query", "response"),
    ("question", "answers"),
)  # fmt: skip
RESERVED = ("id", "messages", "expected", "actual", "error", *IMAGE_COLUMNS)
# Fields that formats read. Where tables have no value, they have null.
KNOWN = {
    *RESERVED, *(name for pair in COLUMNS for name in pair), "text", "tools", "system", "instruction",
    "input", "output", "history", "conversations",
}  # fmt: skip
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
    "function_call": "function_call", "observation": "observation", "tool_call": "tool_call",
    "tool_response": "tool_response",
}  # fmt: skip
SYSTEM_PROMPT = re.compile(r"\[SYSTEM_PROMPT\](.*?)\[/SYSTEM_PROMPT\]", re.DOTALL)
TURN = re.compile(r"\s*(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?:</s>|(?=\[INST\])|\Z)", re.DOTALL)


class Conversation(NamedTuple):
    """What a row asks and answers, and the fields that say so."""

    messages: list[Message]
    expected: str | list[str] | None  # a list where several answers are right
    used: set[str]


def possible_formats(row: JsonObject, columns: dict[str, str] | None = None) -> list[str]:
    """The formats a row may have, the likeliest first; none for a row of no known kind.

    Args:
        columns: the user's columns of `prompt`, `answer` or `json`, and `image`, as `value_of` takes them; without
            `prompt` there is one question for all rows.
    """
    messages = row.get("messages")
    if columns:
        return ["columns"]
    if "conversations" in row:
        return ["llava"] if "image" in row or "images" in row else ["sharegpt", "llava"]
    if isinstance(messages, list) and messages:
        if row.get("expected") is not None:
            return ["native"]
        return ["openai"] if any(map(_is_openai, messages)) else ["native", "openai"]
    if "instruction" in row and "output" in row:
        return ["alpaca"]
    if any(prompt in row and answer in row for prompt, answer in COLUMNS):
        return ["columns"]
    if isinstance(row.get("text"), str):
        return ["inst" if TURN.match(SYSTEM_PROMPT.sub("", row["text"], count=1)) else "native"]
    return []


def how_to_map(row: JsonObject) -> str:
    """What makes a record of a row of no known format."""
    if {"data", "annotations"} <= row.keys():
        return 'give Label Studio\'s export as: python -m reformat_data IN OUT --format label_studio --question "…"'
    maps = " ".join(f"--map {part}=COLUMN" for part in ("prompt", "answer", "image"))
    return f'name its columns: python -m reformat_data IN OUT {maps} (or --question "…" for all, in place of `prompt`)'


def _is_openai(message: Json) -> bool:
    """Whether a message has what only OpenAI's rows have: images as image_url parts, or the developer's role."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else []
    return bool(content) and (
        message.get("role") == "developer" or any(isinstance(p, dict) and p.get("type") == "image_url" for p in parts)
    )


def as_record(row: JsonObject) -> JsonObject:
    """A row of a data file as a record, not yet checked.

    Prompt and answer columns and [INST] text become messages; images in columns of their own are placed as `row_images`
    says; tools written as JSON text are read. Everything else stays as it is.

    Raises:
        ValueError: why that cannot be done, in one line.
    """
    row = without_known_nulls(row)
    refuse_unread(row)
    form = next(iter(possible_formats(row)), None)
    if form in DIRECT:
        return convert(row, form)[0]
    return _with_tools(_show_images(row) if form == "native" else row)


def _with_tools(row: JsonObject) -> JsonObject:
    """A row with its tools read where they stand as text, as LLaMA-Factory has them: functions alone, or none."""
    text = row.get("tools")
    if not isinstance(text, str):
        return row
    try:
        tools = read_json(text or "[]", halves=False)
    except ValueError:
        raise ValueError("`tools` is text that is no JSON") from None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return row | {"tools": tools}


def without_known_nulls(row: JsonObject) -> JsonObject:
    """A row without those fields that a format reads and the row has as null: they are absent. The user's stay."""
    return {name: value for name, value in row.items() if value is not None or name not in KNOWN}


def _show_images(row: JsonObject) -> JsonObject:
    """A native row with the images of its columns in its messages."""
    messages = row.get("messages")
    if isinstance(messages, list):
        rest = {name: value for name, value in row.items() if name not in IMAGE_COLUMNS}
        return (row if rest.keys() == row.keys() else rest) | {"messages": place_images(tidy(messages), images_of(row))}
    if "messages" not in row:
        refuse_pages(row, {"answer": "text"})
    return row


def convert(
    row: JsonObject, form: str, columns: dict[str, str] | None = None, question: str | None = None
) -> tuple[JsonObject, list[str]]:
    """One row as a record, not yet checked; images stay the paths or URLs that they were.

    Args:
        columns: as in `possible_formats`.
        question: of rows that have none of their own.

    Returns:
        The record, and the names of fields that were left out because a record uses them otherwise.

    Raises:
        ValueError: why it is no row of this format, in one line.
    """
    refuse_unread(row)
    record = {"id": row["id"]} if row.get("id") is not None else {}
    used: set[str] = set()
    if form != "native" or "messages" in row:  # or else it is plain text
        messages, expected, used = _columns(row, columns, question) if form == "columns" else CONVERTERS[form](row)
        record |= {"messages": messages} | ({} if expected is None else {"expected": expected})
    others = {name: value for name, value in row.items() if name not in used and name != "id"}
    kept = {name: value for name, value in others.items() if name not in RESERVED}
    return _with_tools(record | kept), [name for name in others if name in RESERVED]


def _native(row: JsonObject) -> Conversation:
    messages = place_images(_messages(row), images_of(row))
    return Conversation(messages, row.get("expected"), {"messages", "expected", *IMAGE_COLUMNS})


def _messages(row: JsonObject) -> list[Message]:
    """A row's messages, the developer's role under its older name."""
    messages = _list(row, "messages")
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("a message must be an object with `role` and `content`")
    return tidy([m | {"role": "system"} if m.get("role") == "developer" else m for m in messages])


def _alpaca(row: JsonObject) -> Conversation:
    prompt, extra = _text(row, "instruction"), _text(row | {"input": row.get("input") or ""}, "input")
    asked = {"role": "user", "content": f"{prompt}\n\n{extra}" if extra.strip() else prompt}
    messages = [*_system(row), *_history(row), asked]
    used = {"instruction", "input", "output", "system", "history", *IMAGE_COLUMNS}
    return Conversation(place_images(with_weights(messages, default=1), images_of(row)), _text(row, "output"), used)


def _history(row: JsonObject) -> list[Message]:
    messages = []
    for pair in _list(row, "history") if row.get("history") else []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError("`history` must be a list of [question, answer] pairs")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _sharegpt(row: JsonObject) -> Conversation:
    if images_of(row):
        raise ValueError("has images: convert the file with --format llava")
    return _conversations(row)


def _llava(row: JsonObject) -> Conversation:
    messages, expected, used = _conversations(row)
    images = images_of(row)
    if not images and any(TAG in message["content"] for message in messages):
        raise ValueError(f"the text says {TAG}, but the row has no `image`")
    return Conversation(place_images(messages, images), expected, used | {*IMAGE_COLUMNS})


def _conversations(row: JsonObject) -> Conversation:
    messages = _system(row)
    turns = _list(row, "conversations")
    if all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):  # as unsloth has them
        return Conversation(*_answered(messages + _messages({"messages": turns})), {"conversations", "system"})
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {number}: expected an object with `from` and a string `value`")
        if turn.get("from") not in list(SPEAKERS):  # which may be no string
            raise ValueError(f"turn {number}: unknown `from` {turn.get('from')!r}; expected {', '.join(SPEAKERS)}")
        messages.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return Conversation(*_answered(tidy(messages)), {"conversations", "system"})


def _openai(row: JsonObject) -> Conversation:
    messages = place_images(_messages(row), images_of(row))
    return Conversation(*_answered(messages), {"messages", *IMAGE_COLUMNS})


def _answered(messages: list[Message]) -> tuple[list[Message], str | None]:
    """The messages up to the last, which is the answer to learn, and that answer.

    All messages and None if it is no text to learn, but a tool call, of weight 0 or with thinking. Earlier answers are
    learned too, as other toolkits do.
    """
    last = messages[-1]
    if last.get("role") != "assistant":
        raise ValueError(f"ends with the {last.get('role')}'s turn, so there is no answer to learn")
    answer = last.get("content")
    parts = [part for part in answer if isinstance(part, dict)] if isinstance(answer, list) else []
    if last.get("tool_calls") or last.get("weight") == 0 or any(part.get("type") == "thinking" for part in parts):
        return messages, None
    if isinstance(answer, list) and all(isinstance(b, dict) and isinstance(b.get("text"), str) for b in answer):
        answer = "".join(block["text"] for block in answer)
    if not isinstance(answer, str):
        raise ValueError("the last answer must be text")
    return with_weights(messages[:-1], default=1), answer


def _columns(row: JsonObject, columns: dict[str, str] | None, question: str | None = None) -> Conversation:
    by_name = columns is None
    if columns is None:
        pairs = [pair for pair in COLUMNS if pair[0] in row and pair[1] in row]
        if not pairs:
            known = ", ".join("/".join(pair) for pair in COLUMNS)
            raise ValueError(f"has none of {known}; name the columns: --map prompt=COLUMN --map answer=COLUMN")
        columns = dict(zip(("prompt", "answer"), pairs[0], strict=True))
    values = {part: value_of(row, column) for part, column in columns.items()}
    names = (columns["image"],) if "image" in columns else IMAGE_COLUMNS
    images = images_of({columns["image"]: values["image"]} if "image" in columns else row, names)
    if "image" in columns and not images:
        raise ValueError(f"no `{columns['image']}`")
    used = {*columns.values(), "system", "history", *names}
    if by_name:
        refuse_pages(row, columns)
    prompt, answer = values.get("prompt", question), values.get("answer")
    if isinstance(prompt, list) and isinstance(answer, list) and all(isinstance(m, dict) for m in prompt + answer):
        messages = tidy(with_weights(prompt, default=0) + answer)
        return Conversation(place_images(messages, images), None, used)
    asked = question or _text({columns["prompt"]: prompt}, columns["prompt"])
    messages = [*_system(row), *_history(row), {"role": "user", "content": asked}]
    messages = place_images(with_weights(messages, default=1), images)
    read, part = (json_of, "json") if "json" in columns else (answer_of, "answer")
    return Conversation(messages, read(values[part], columns[part]), used)


def _inst(row: JsonObject) -> Conversation:
    refuse_pages(row, {"answer": "text"})
    text, messages = _text(row, "text").strip(), []
    text = text.removeprefix("<s>").lstrip()
    if found := SYSTEM_PROMPT.match(text):
        messages.append({"role": "system", "content": found[1].strip()})
        text = text[found.end() :]
    place = 0
    while place < len(text):
        turn = TURN.match(text, place)
        if not turn or "[INST]" in turn[1] or "[/INST]" in turn[2]:
            raise ValueError("`text` is no chain of [INST] question [/INST] answer</s>")
        messages.append({"role": "user", "content": turn[1].strip()})
        messages.append({"role": "assistant", "content": turn[2].strip()})
        place = turn.end()
    if not messages or not messages[-1]["content"]:
        raise ValueError("`text` has no answer after [/INST]")
    return Conversation(*_answered(messages), {"text"})


CONVERTERS: dict[str, Callable[[JsonObject], Conversation]] = {
    "native": _native,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "llava": _llava,
    "openai": _openai,
    "inst": _inst,
}
FORMATS = (*CONVERTERS, "columns")
DIRECT = ("columns", "inst")  # that every step takes as they are


def _text(row: JsonObject, name: str) -> str:
    value = row.get(name)
    if value is None:
        raise ValueError(f"no `{name}`")
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be a string, got {json.dumps(value)[:40]}")
    return value


def _list(row: JsonObject, name: str) -> list:
    value = row.get(name)
    if not isinstance(value, list) or not value:
        raise ValueError(f"no `{name}`" if value is None else f"`{name}` must be a list with something in it")
    return value


def _system(row: JsonObject) -> list[Message]:
    return [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
