"""Records: one JSON object per line, checked before anything costly starts.

    {"id"?: any, "messages": [{"role": ..., "content": str | [block, ...]}, ...], "expected"?: str, ...}

A block is {"type": "text", "text": str} or {"type": "image", "image": REFERENCE}, as `references.py` explains them.
Fields that are not named here are the user's and travel through predict untouched.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mistral_ft.errors import RecordError, UserError, raise_all
from mistral_ft.formats import possible_formats
from mistral_ft.references import check_reference, expand_pages, resolve

ROLES = ("system", "user", "assistant", "tool")
MAX_NEW_TOKENS = 300  # of an answer that predict writes if it is not told otherwise


@dataclass(frozen=True)
class Record:
    """One checked line of a JSONL file.

    Attributes:
        path: the file.
        line: line number in it, from 1.
        data: the line's JSON object, as the user wrote it.
        images_dir: the folder that image paths are relative to.
    """

    path: Path
    line: int
    data: dict[str, Any]
    images_dir: Path

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.data["messages"]

    @property
    def expected(self) -> str | None:
        return self.data.get("expected")

    @property
    def image_paths(self) -> list[str]:
        """A reference to every image of the record, one per page, in the order in which the prompt shows them."""
        return [resolve(image, self.images_dir) for image in image_blocks(self.messages)]

    def error(self, reason: str) -> RecordError:
        """A `RecordError` that names this record."""
        return RecordError(self.path, self.line, reason)


def read_records(
    paths: Sequence[str | os.PathLike], images_dir: str | os.PathLike | None = None, expected_required: bool = False
) -> list[Record]:
    """Read and check the records of one or more JSONL files.

    Args:
        paths: the files, read in this order.
        images_dir: folder of the images; by default each file's own.
        expected_required: refuse records without `expected`, as training and scoring need it.

    Raises:
        UserError: if a file cannot be read or holds no record, or for bad records: the first in full, the others by
            line number.
    """
    records: list[Record] = []
    errors: list[RecordError] = []
    for path in map(Path, paths):
        folder = find_images_dir(path, images_dir)
        before = len(records) + len(errors)
        for line, data in read_jsonl(path, errors):
            try:
                check_record(data, expected_required)
            except ValueError as error:
                errors.append(RecordError(path, line, f"{error}{how_to_convert(path, data)}"))
            else:
                records.append(Record(path, line, data, folder))
        if len(records) + len(errors) == before:
            raise UserError(f"{path}: holds no record; expected one JSON object per line")
    raise_all(errors)
    return records


def find_images_dir(path: str | os.PathLike, images_dir: str | os.PathLike | None = None) -> Path:
    """The folder that a JSONL file's image paths are relative to: `images_dir`, or else the file's own.

    Raises:
        UserError: if there is no such folder.
    """
    folder = Path(images_dir) if images_dir is not None else Path(path).parent
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images; give it with --images_dir")
    return folder


def how_to_convert(path: Path, data: dict[str, Any]) -> str:
    """What to add to the reason why a row is no record: the command, if it is one that other toolkits write."""
    form = next(iter(possible_formats(data)), "native")
    if form == "native":
        return ""
    command = f"python -m reformat_data {shlex.quote(str(path))} {shlex.quote(f'{path.stem}-records.jsonl')}"
    return f"; this looks like a row of format {form}, which becomes a record by: {command}"


def image_blocks(messages: Sequence[dict[str, Any]]) -> list[str]:
    """Every image in checked messages, as the user wrote it but one reference per page, in order."""
    return [
        block["image"]
        for message in expand_pages(messages)
        if isinstance(message.get("content"), list)
        for block in message["content"]
        if block["type"] == "image"
    ]


def read_jsonl(path: str | os.PathLike, errors: list[RecordError]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for every line of a JSONL file; lines that are no JSON object go to `errors`.

    Raises:
        UserError: if the file cannot be read as one.
    """
    with open_jsonl(path) as file:
        for line, raw in enumerate(file, 1):
            try:
                data = parse_line(raw, first=line == 1)
            except ValueError as error:
                errors.append(RecordError(path, line, str(error)))
            else:
                if data is not None:
                    yield line, data


def open_jsonl(path: str | os.PathLike) -> BinaryIO:
    """Open a JSONL file to read its lines as bytes.

    Raises:
        UserError: if there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a JSONL file in it, such as {path / 'train.jsonl'}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return open(path, "rb")


def parse_line(raw: bytes, first: bool = False) -> dict[str, Any] | None:
    """The JSON object of one line of a JSONL file, or None if the line is blank.

    Args:
        first: whether it is the file's first line, which may start with a byte order mark.

    Raises:
        ValueError: what is wrong, in one line, without the place.
    """
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
        if not text.strip():
            return None
        data = json.loads(text)
        # JSON can spell half a surrogate pair, which is no text: no tokenizer encodes it and no file takes it.
        half = r"\ud" in text.lower() and re.search("[\ud800-\udfff]", json.dumps(data, ensure_ascii=False))
    except UnicodeDecodeError as error:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("not UTF-8 text but UTF-16; save the file as UTF-8") from None
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(_explain(text, error)) from None
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None
    except ValueError:  # Python's limit against numbers that take minutes to read
        raise ValueError("holds a number of more than 4300 digits") from None
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, got {_kind(data)}")
    if half:
        raise ValueError("holds half a surrogate pair (\\ud800 to \\udfff), which is no valid text")
    return data


def _explain(text: str, error: json.JSONDecodeError) -> str:
    """One line about broken JSON that says what to mend, where the usual cause can be told."""
    if text.lstrip()[:1] == "[" or text.strip() == "{":
        return "not one JSON object per line: write each record on a line of its own, with no list around them"
    for comma in re.finditer(r",\s*[}\]]", text):
        # Python 3.13 points at the comma, older ones at what follows it.
        if comma.start() <= error.pos < comma.end():
            return f"trailing comma at column {comma.start() + 1}: JSON allows none, remove it"
    if not text[error.pos :].strip() or error.msg.startswith("Unterminated string"):
        return f"the line ends in the middle of the record (column {len(text.rstrip())}): is the file cut off?"
    return f"not JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}"


def check_record(data: dict[str, Any], expected_required: bool = False) -> None:
    """Check one record's shape.

    Raises:
        ValueError: what is wrong, in one line, without the place.
    """
    messages = data.get("messages")
    if messages is None:
        raise ValueError("no `messages`; expected a list of messages with `role` and `content`")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` must be a list of at least one message, got {_kind(messages)}")
    for number, message in enumerate(messages, 1):
        try:
            _check_message(message, messages[number - 2] if number > 1 else None)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    last = messages[-1]["role"]
    if last not in ("user", "tool"):
        raise ValueError(f"the last message must be the user's, got {last!r}; the answer to learn goes in `expected`")
    if all(m["role"] != "user" for m in messages):
        raise ValueError("no message has role 'user'")

    expected = data.get("expected")
    if expected is None:
        if expected_required:
            raise ValueError("no `expected`: the answer to learn and to score against")
    elif not isinstance(expected, str):
        raise ValueError(f"`expected` must be a string, got {_kind(expected)}; put JSON answers in quotes")
    tools = data.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"`tools` must be a list of objects, got {_kind(tools)}")


def _check_message(message: Any, previous: dict[str, Any] | None) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"expected an object with `role` and `content`, got {_kind(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; expected one of {', '.join(ROLES)}")
    if role == "system" and previous is not None and previous["role"] not in ("system", "user"):
        raise ValueError(f"a system message cannot follow a message of role {previous['role']!r}")
    if role == "tool" and (previous is None or previous["role"] not in ("assistant", "tool")):
        raise ValueError("a tool message must follow the assistant's tool call")

    if isinstance(content, list):
        for number, block in enumerate(content, 1):
            try:
                _check_block(block, role)
            except ValueError as error:
                raise ValueError(f"block {number}: {error}") from None
    elif not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
        raise ValueError(f"`content` must be a string or a list of blocks, got {_kind(content)}")
    if role == "assistant" and not content and not message.get("tool_calls"):
        raise ValueError("an assistant message says nothing: it needs `content` or `tool_calls`")
    if message.get("tool_calls") is not None:
        if role != "assistant":
            raise ValueError(f"`tool_calls` belong in an assistant message, not in one of role {role!r}")
        _check_tool_calls(message["tool_calls"])
    if not isinstance(message.get("tool_call_id", ""), str):
        raise ValueError(f"`tool_call_id` must be a string, got {_kind(message['tool_call_id'])}")


def _check_tool_calls(calls: Any) -> None:
    shape = '[{"id": …, "function": {"name": …, "arguments": …}}]'
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"`tool_calls` must look like {shape}, got {_kind(calls)}")
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"`tool_calls` must look like {shape}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise ValueError(f"`arguments` of {function['name']} are no JSON") from None
        if not isinstance(arguments, dict):
            raise ValueError(f"`arguments` of {function['name']} must be a JSON object, got {_kind(arguments)}")


def _check_block(block: Any, role: str) -> None:
    if not isinstance(block, dict):
        raise ValueError(f"expected an object with `type`, got {_kind(block)}")
    kind = block.get("type")
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise ValueError(f"`text` must be a string, got {_kind(block.get('text'))}")
    elif kind == "image":
        if role != "user":
            raise ValueError(f"an image belongs in a user message, not in one of role {role!r}")
        if not isinstance(block.get("image"), str) or not block["image"]:
            raise ValueError(f"`image` must be the path of an image file, got {_kind(block.get('image'))}")
        check_reference(block["image"])
    else:
        raise ValueError(f"unknown type {kind!r}; expected 'text' or 'image'")


def _kind(value: Any) -> str:
    names = {type(None): "nothing", bool: "true/false", dict: "an object", list: "a list", str: "a string"}
    if isinstance(value, list) and not value:
        return "an empty list"
    if isinstance(value, str) and not value:
        return "an empty string"
    return names.get(type(value), f"the number {value}")
