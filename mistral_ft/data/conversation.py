"""Conversations as the model's template knows them: who speaks in turn, what is joined, which answers are learned.

Plain data in, plain data out; nothing here knows of tokens.
"""

import json
from collections.abc import Iterable, Sequence

from mistral_ft.files import Json, JsonObject

Message = JsonObject


def merge_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages with block lists; consecutive ones of the user or of the assistant joined, as mistral-common does.

    Answers of the assistant that are learned and answers that are not (`weight` 0) stay apart.
    """
    merged: list[Message] = []
    for message in messages:
        content = message.get("content") or []
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if merged and message["role"] in ("user", "assistant") and _who(message) == _who(merged[-1]):
            blocks = merged[-1]["content"] + blocks
            calls = [*(merged[-1].get("tool_calls") or []), *(message.get("tool_calls") or [])]
            merged[-1] = message | {"content": _merge_texts(blocks), "tool_calls": calls}
        else:
            merged.append(message | {"content": _merge_texts(blocks)})
    return merged


def _who(message: Message) -> tuple[str, bool]:
    return message["role"], bool(message.get("weight"))


def _merge_texts(blocks: Iterable[JsonObject]) -> list[JsonObject]:
    """Adjacent texts become one, with a blank line between them; empty ones go."""
    merged: list[JsonObject] = []
    for block in blocks:
        if block["type"] == "text" and not block["text"]:
            continue
        if block["type"] == "text" and merged and merged[-1]["type"] == "text":
            merged[-1] = block | {"text": merged[-1]["text"] + "\n\n" + block["text"]}
        else:
            merged.append(block)
    return merged


def text_of(message: Message) -> str:
    """The text of a merged message."""
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def thinks(message: Message) -> bool:
    """Whether a merged message has thinking in it."""
    return any(block["type"] == "thinking" for block in message["content"])


def thinking_text(block: JsonObject) -> str:
    """What a block of thinking says: a text, or as Mistral's API has it a list of text blocks."""
    thinking = block["thinking"]
    return thinking if isinstance(thinking, str) else "".join(part["text"] for part in thinking)


def thinking_of(message: Message) -> str:
    """All the thinking of a merged message."""
    return "".join(thinking_text(block) for block in message["content"] if block["type"] == "thinking")


def said(message: Message) -> str:
    """The text of a merged answer. Like mistral-common, without spaces at its end, but for those after thinking."""
    return text_of(message) if thinks(message) else text_of(message).rstrip(" ")


def tools_text(tools: Iterable[JsonObject]) -> str:
    """Tools in OpenAI's shape as the template writes them: what mistral-common knows of each, in its order."""
    found = []
    for tool in tools:
        function = tool["function"]
        about = {"description": function.get("description") or "", "parameters": function.get("parameters") or {}}
        found.append({"type": "function", "function": {"name": function["name"], **about}})
    return to_json(found)


def tool_calls(calls: Iterable[JsonObject]) -> list[JsonObject]:
    """Calls in OpenAI's shape as the template knows them: name, arguments as an object, id if there is one."""
    found = []
    for call in calls:
        arguments = call["function"]["arguments"]
        arguments = parsed(arguments) if isinstance(arguments, str) else arguments
        entry = {"name": call["function"]["name"], "arguments": arguments}
        found.append(entry | ({"id": call["id"]} if call.get("id") else {}))
    return found


def tool_calls_text(calls: Iterable[JsonObject]) -> str:
    """Calls as the template writes them up to v7: a list in JSON."""
    return to_json(tool_calls(calls))


def parsed(text: str) -> Json:
    """What a text says as JSON, or the text itself if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def to_json(data: Json) -> str:
    """JSON as the template writes tools and calls."""
    return json.dumps(data, ensure_ascii=False)


def answer_text(messages: Sequence[Message]) -> str:
    """What messages of the assistant say, as predict reads it from the model: their text, then their calls as JSON.

    What they think is no part of it.
    """
    parts = []
    for message in merge_messages(messages):
        parts.append(said(message))
        parts += [tool_calls_text(message["tool_calls"])] if message.get("tool_calls") else []
    return "".join(parts)


def answer_start(messages: Sequence[Message]) -> int:
    """Where the assistant's last words begin, if a conversation ends with them: the number of messages before."""
    start = len(messages)
    while start and messages[start - 1]["role"] == "assistant":
        start -= 1
    return start


def with_weights(messages: Sequence[Message], default: int) -> list[Message]:
    """The messages, each of the assistant's with a `weight`: its own, or else `default`."""
    return [
        message | {"weight": default if message.get("weight") is None else message["weight"]}
        if message.get("role") == "assistant"
        else message
        for message in messages
    ]
