"""Records: rows of a data file, checked before anything costly starts.

    {"id"?: any, "messages": [{"role": ..., "content": str | [block, ...]}, ...], "expected"?: str or [str, ...],
     "tools"?: [...]}

A block is {"type": "text", "text": str} or {"type": "image", "image": REFERENCE}, as `references.py` explains them; of
the assistant and the system also {"type": "thinking", "thinking": str or [text block, ...], "closed"?: bool}, as in
Mistral's API.
Where `expected` is a list, all of it is right and the first is learned.
Without `expected` the last messages may be the assistant's: then all of the assistant's messages are learned, but for
those with `weight` 0. In records with `expected` it is learned alone, and those of the assistant's messages whose
`weight` is 1.

A row may also be {"text": str}, plain text that is learned whole; or what `formats.DIRECT` names, which becomes a
record when it is read. Fields that are not named here are the user's and travel through predict untouched.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_ft.data.conversation import answer_start, answer_text, merge_messages, thinking_of, with_weights
from mistral_ft.data.foreign.unread import refuse_unread
from mistral_ft.data.formats import DIRECT, as_record, how_to_map, possible_formats
from mistral_ft.data.json_fields import kind_of, read_json
from mistral_ft.data.references import check_reference, expand_pages, resolve
from mistral_ft.data.row_images import IMAGE_COLUMNS, check_boxes, check_tag
from mistral_ft.data.row_keys import right_answers
from mistral_ft.data.rows import RowSource, is_table, read_objects
from mistral_ft.errors import RecordError, UserError, raise_all
from mistral_ft.files import Json, JsonObject

ROLES = ("system", "user", "assistant", "tool")
MAX_NEW_TOKENS = 300  # of an answer that predict writes if it is not told otherwise
MAX_SEQ_LENGTH = 32768  # of a record, likewise


@dataclass(frozen=True)
class Record:
    """One checked row.

    Attributes:
        path: the file.
        line: line number in it, from 1; of a JSON array or a table the number of the row.
        data: the row's JSON object, made a record by `as_record`.
        images_dir: the folder that image paths are relative to.
        piece: of a piece of a long plain text, the ids that it is made of; None for whole records.
    """

    path: Path
    line: int
    data: JsonObject
    images_dir: Path
    piece: Sequence[int] | None = None

    @property
    def text(self) -> str | None:
        """The text of a row that is plain text."""
        return None if "messages" in self.data else self.data["text"]

    @property
    def messages(self) -> list[JsonObject]:
        """The prompt: all messages up to the answer."""
        messages = self.data.get("messages", [])
        return messages if self.data.get("expected") is not None else messages[: answer_start(messages)]

    @property
    def answers(self) -> list[str]:
        """The right answers to score against: those in `expected`, or what the assistant's last messages say."""
        messages, answers = self.data.get("messages", []), right_answers(self.data)
        if not answers and (start := answer_start(messages)) < len(messages):
            return [answer_text(messages[start:])]
        return answers

    @property
    def expected(self) -> str | None:
        """The first of the right answers, which is learned."""
        return next(iter(self.answers), None)

    @property
    def conversation(self) -> list[JsonObject]:
        """The messages with all answers, each of the assistant's with its `weight`: what training reads."""
        messages, answers = self.data.get("messages", []), right_answers(self.data)
        if not answers:
            return with_weights(messages, default=1)
        return [*with_weights(messages, default=0), {"role": "assistant", "content": answers[0], "weight": 1}]

    @property
    def learned(self) -> list[str]:
        """Every text that training learns, in order; of answers what they think, then what they say."""
        if self.text is not None:
            return [self.text]
        return [thinking_of(m) + answer_text([m]) for m in merge_messages(self.conversation) if m.get("weight")]

    @property
    def row(self) -> JsonObject:
        """The row as predict writes it: what is asked in `messages`, what is to be answered in `expected`."""
        messages = self.data.get("messages", [])
        if self.data.get("expected") is not None or answer_start(messages) == len(messages):
            return self.data
        return self.data | {"messages": with_weights(self.messages, default=1), "expected": self.expected}

    @property
    def image_paths(self) -> list[str]:
        """A reference to every image of the record, one per page, in the order in which the prompt shows them."""
        return [resolve(image, self.images_dir) for image in image_blocks(self.messages)]

    def error(self, reason: str) -> RecordError:
        """A `RecordError` that names this record."""
        return RecordError(self.path, self.line, reason)


def as_predicted(row: JsonObject) -> JsonObject:
    """A row that predict may have seen as it would have written it; a row that is no record as it is."""
    try:
        return Record(Path(), 0, checked(row), Path()).row
    except ValueError:
        return row


def checked(row: JsonObject) -> JsonObject:
    """A row of a data file as a checked record; raises ValueError if it is none, in one line."""
    data = as_record(row)
    check_record(data)
    return data


def read_records(
    paths: Sequence[str | os.PathLike], images_dir: str | os.PathLike | None = None, expected_required: bool = False
) -> list[Record]:
    """Read and check the records of one or more sources.

    Args:
        paths: JSONL files and whatever else `rows.RowSource` reads, in this order.
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
        for line, data in read_objects(RowSource(path, folder), errors):
            try:
                data = as_record(data)
                check_record(data, expected_required)
            except ValueError as error:
                errors.append(RecordError(path, line, f"{error}{how_to_convert(path, data)}"))
            else:
                records.append(Record(path, line, data, folder))
        if len(records) + len(errors) == before:
            raise UserError(f"{path}: holds no record")
    raise_all(errors)
    return records


def find_images_dir(path: str | os.PathLike, images_dir: str | os.PathLike | None = None) -> Path:
    """The folder that a source's image paths are relative to: `images_dir`, or else the one the source is in.

    Raises:
        UserError: if there is no such folder.
    """
    folder = Path(images_dir) if images_dir is not None else Path(path).parent
    if images_dir is None and is_table(path) and not folder.is_dir():
        folder = Path()  # a hub id
    if not folder.is_dir() and images_dir is None:
        raise UserError(f"{path}: no such file")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images; give it with --images_dir")
    return folder


def how_to_convert(path: Path, data: JsonObject) -> str:
    """What to add to the reason why a row is no record: the command, if it is one that other toolkits write."""
    form = next(iter(possible_formats(data)), None)
    try:
        refuse_unread(data)
    except ValueError:  # which no conversion mends
        return ""
    if form is None and "messages" not in data and data:
        return f"; or {how_to_map(data)}"
    if form in (None, "native", *DIRECT):
        return ""
    command = f"python -m reformat_data {shlex.quote(str(path))} {shlex.quote(f'{path.stem}-records.jsonl')}"
    return f"; this looks like a row of format {form}, which becomes a record by: {command}"


def image_blocks(messages: Sequence[JsonObject]) -> list[str]:
    """Every image in checked messages, as the user wrote it but one reference per page, in order."""
    return [
        block["image"]
        for message in expand_pages(messages)
        if isinstance(message.get("content"), list)
        for block in message["content"]
        if block["type"] == "image"
    ]


def check_record(data: JsonObject, expected_required: bool = False) -> None:
    """Check one record's shape.

    Raises:
        ValueError: what is wrong, in one line, without the place.
    """
    messages = data.get("messages")
    if messages is None and "text" in data:
        return _check_text(data)
    if messages is None:
        raise ValueError("no `messages`; expected a list of messages with `role` and `content`")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` must be a list of at least one message, got {kind_of(messages)}")
    for number, message in enumerate(messages, 1):
        try:
            _check_message(message, messages[number - 2] if number > 1 else None)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    if all(m["role"] != "user" for m in messages):
        raise ValueError("no message has role 'user'")

    answers, last = right_answers(data), messages[-1]["role"]
    for answer in answers:
        check_boxes(answer)
    if last not in ("user", "tool", "assistant"):
        raise ValueError(f"the last message must be the user's, a tool's or the assistant's, got {last!r}")
    if last == "assistant" and answers:
        raise ValueError("the answer is there twice, as the last message and in `expected`; leave out one of them")
    if expected_required and not answers:
        if last != "assistant":
            raise ValueError("no `expected`: the answer to learn and to score against")
        if not any(m.get("weight", 1) for m in messages if m["role"] == "assistant"):
            raise ValueError("every message of the assistant has `weight` 0, so there is nothing to learn")
    tools = data.get("tools")
    if tools is not None:
        _check_tools(tools)


def _check_tools(tools: Json) -> None:
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"`tools` must be a list of objects, got {kind_of(tools)}")
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('`tools` must look like [{"type": "function", "function": {"name": …, "parameters": …}}]')


def _check_text(data: JsonObject) -> None:
    text = data["text"]
    if not isinstance(text, str):
        raise ValueError(f"`text` must be a string, got {kind_of(text)}")
    if not text.strip():
        raise ValueError("`text` is empty")
    if data.get("expected") is not None:
        raise ValueError("`text` is learned whole and has no `expected`; a question and its answer need `messages`")


def _check_message(message: Json, previous: JsonObject | None) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"expected an object with `role` and `content`, got {kind_of(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; expected one of {', '.join(ROLES)}")
    if role == "system" and previous is not None and previous["role"] not in ("system", "user"):
        raise ValueError(f"a system message cannot follow a message of role {previous['role']!r}")
    if role == "tool" and (previous is None or previous["role"] not in ("assistant", "tool")):
        raise ValueError("a tool message must follow the assistant's tool call")
    before = previous.get("content") if previous is not None and role == previous["role"] == "assistant" else None
    if isinstance(before, list) and before and _is_open(before[-1]):  # the two are joined
        raise ValueError(
            "follows thinking that is not `closed`, which must be the last thing that the assistant writes"
        )

    if isinstance(content, list):
        for number, block in enumerate(content, 1):
            try:
                _check_block(block, role)
            except ValueError as error:
                raise ValueError(f"block {number}: {error}") from None
    elif isinstance(content, str):
        _check_tags(content, role)
    elif content is not None or not message.get("tool_calls"):
        raise ValueError(f"`content` must be a string or a list of blocks, got {kind_of(content)}")
    if column := next((name for name in IMAGE_COLUMNS if message.get(name)), None):
        raise ValueError(f"its `{column}` is not read; name images in blocks of the user's messages")
    if role == "assistant" and not content and not message.get("tool_calls"):
        raise ValueError("an assistant message says nothing: it needs `content` or `tool_calls`")
    weight = message.get("weight")
    if weight is not None and (role != "assistant" or weight not in (0, 1)):
        raise ValueError("`weight` belongs in an assistant message, and is 1 to learn it or 0 to leave it out")
    if message.get("tool_calls") is not None:
        if role != "assistant":
            raise ValueError(f"`tool_calls` belong in an assistant message, not in one of role {role!r}")
        _check_tool_calls(message["tool_calls"])
    if isinstance(content, list):
        behind = [*content[1:], *(message.get("tool_calls") or [])]
        # Nobody could tell where it ends.
        if any(_is_open(block) for block, _ in zip(content, behind, strict=False)):
            raise ValueError("thinking that is not `closed` must be the last thing in its message")
    if not isinstance(message.get("tool_call_id", ""), str):
        raise ValueError(f"`tool_call_id` must be a string, got {kind_of(message['tool_call_id'])}")


def _check_tags(text: str, role: str) -> None:
    if role in ("user", "tool"):
        check_tag(text)
    check_boxes(text)


def _check_tool_calls(calls: Json) -> None:
    shape = '[{"id": …, "function": {"name": …, "arguments": …}}]'
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"`tool_calls` must look like {shape}, got {kind_of(calls)}")
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"`tool_calls` must look like {shape}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = read_json(arguments, halves=False)
            except ValueError:
                raise ValueError(f"`arguments` of {function['name']} are no JSON") from None
        if not isinstance(arguments, dict):
            raise ValueError(f"`arguments` of {function['name']} must be a JSON object, got {kind_of(arguments)}")


def _check_thinking(thinking: Json, closed: Json) -> None:
    if isinstance(thinking, list):
        for part in thinking:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError("the list in `thinking` must hold text blocks and nothing else")
    elif not isinstance(thinking, str):
        raise ValueError(f"`thinking` must be a string or a list of text blocks, got {kind_of(thinking)}")
    if not isinstance(closed, bool | None):
        raise ValueError(f"`closed` must be true or false, got {kind_of(closed)}")


def _is_open(block: JsonObject) -> bool:
    return block["type"] == "thinking" and block.get("closed") is False


def _check_block(block: Json, role: str) -> None:
    if not isinstance(block, dict):
        raise ValueError(f"expected an object with `type`, got {kind_of(block)}")
    kind = block.get("type")
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise ValueError(f"`text` must be a string, got {kind_of(block.get('text'))}")
        if block.get("image") is not None:
            raise ValueError("a text with an `image`; put the image into a block of its own")
        _check_tags(block["text"], role)
    elif kind == "image":
        if role != "user":
            raise ValueError(f"an image belongs in a user message, not in one of role {role!r}")
        if not isinstance(block.get("image"), str) or not block["image"]:
            raise ValueError(f"`image` must be the path of an image file, got {kind_of(block.get('image'))}")
        if block.get("text") is not None:
            raise ValueError("an image with a `text`; put the text into a block of its own")
        check_reference(block["image"])
    elif kind == "thinking":
        if role not in ("assistant", "system"):
            raise ValueError(f"thinking belongs in an assistant or system message, not in one of role {role!r}")
        _check_thinking(block.get("thinking"), block.get("closed"))
    else:
        raise ValueError(f"unknown type {kind!r}; expected 'text', 'image' or 'thinking'")
