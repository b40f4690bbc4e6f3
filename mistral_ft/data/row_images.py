"""The images that a row has beside its messages, and where they are shown: one rule for every format.

They go, in order, to the places that the user's messages keep for them: `<image>` in a text, or an image block without
an image. Where there are none, they are shown before the first question, as TRL and LLaVA do it.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence

from mistral_ft.data.conversation import Message
from mistral_ft.data.json_fields import read_json
from mistral_ft.files import Json, JsonObject

IMAGE_COLUMNS = ("image", "images")
TAG = "<image>"
BOXES = re.compile("<bbox>|<ref-object>")  # where ms-swift writes an object of the row
CALLS, RESULTS = ("tool_call", "function_call"), ("tool_response", "observation")  # roles, elsewhere


# Set where `<image>` in a text is text: what each process of a step reads.
KEEP_TAG = "MISTRAL_FT_KEEP_IMAGE_TAG"


def keep_image_tag(keep: bool) -> None:
    """Take `<image>` in a question that has no image for text, in this process and those that it starts."""
    if keep:
        os.environ[KEEP_TAG] = "1"


def check_tag(text: str) -> None:
    """Raises ValueError if a question says `<image>`, which would be learned letter by letter."""
    if TAG in text and KEEP_TAG not in os.environ:
        raise ValueError(f"the text says {TAG}, and the row has no image for it; if it is text, give --keep_image_tag")


def check_boxes(text: str) -> None:
    """Raises ValueError if a text has a place for ms-swift's boxes, which would be learned letter by letter."""
    if (found := BOXES.search(text)) and KEEP_TAG not in os.environ:
        raise ValueError(f"the text says {found[0]}: write what it stands for; if it is text, give --keep_image_tag")


def images_of(row: JsonObject, names: Sequence[str] = IMAGE_COLUMNS) -> list[str]:
    """The references of a row's images, from columns that hold one or a list of them.

    Raises:
        ValueError: if one is no reference, or two columns have different ones.
    """
    found = [list(map(reference_of, _listed(row[name]))) for name in names if row.get(name)]
    if any(other != found[0] for other in found):
        raise ValueError(f"{' and '.join(f'`{name}`' for name in names)} have different images; leave one of them out")
    return found[0] if found else []


def _listed(value: Json) -> list[Json]:
    if isinstance(value, str) and value.startswith("["):  # a list, as CSV has it
        with contextlib.suppress(ValueError):
            value = read_json(value)
    return value if isinstance(value, list) else [value]


def reference_of(value: Json) -> str:
    """An image as rows write it, a path or URL, alone or under "path" or "url"; raises ValueError if it is neither."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            raise ValueError("an image's bytes cannot stand in JSON: write its path, or a data: URL")
        value = next((value[name] for name in ("path", "url", "image_url") if value.get(name)), None)
        value = value.get("url") if isinstance(value, dict) else value  # OpenAI's {"image_url": {"url": …}}
    if not isinstance(value, str) or not value:
        raise ValueError("an image must be a path, or a data: or file: URL")
    return value


def tidy(messages: list[Message]) -> list[Message]:
    """Messages as other libraries write them in this one's shape; what stays as it is is not copied.

    What is null is left out: tables have every key in every message and block. (Arguments of tools keep theirs.) Images
    are named by `image`, whether they stood there, under `path` or `url`, or in `images` of the message. Calls that are
    messages of their own with JSON as text become `tool_calls`, results of them messages of role `tool`.

    Raises:
        ValueError: if that cannot be done, in one line.
    """
    return [_tidy_message(message) if isinstance(message, dict) else message for message in messages]


def _tidy_message(message: Message) -> Message:
    message = {name: value for name, value in message.items() if value is not None or name == "content"}
    if isinstance(message.get("content"), list):
        message["content"] = [_tidy_block(b) if isinstance(b, dict) else b for b in message["content"]]
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [without_nulls(c) if isinstance(c, dict) else c for c in message["tool_calls"]]
    if message.get("role") in RESULTS:
        message["role"] = "tool"
    if message.get("role") in CALLS:
        message |= {"role": "assistant", "content": "", "tool_calls": _calls(message.get("content"))}
    if message.get("role") == "user" and (images := images_of(message)):
        rest = {name: value for name, value in message.items() if name not in IMAGE_COLUMNS}
        return place_images([rest], images)[0]
    return message


def _calls(content: Json) -> list[JsonObject]:
    """Tool calls that stand in a message as text."""
    try:
        calls = read_json(content) if isinstance(content, str) else content
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise ValueError(f'a tool call must be JSON as {{"name": …, "arguments": …}}, not {str(content)[:80]}')
    return [{"type": "function", "function": call} for call in calls]


def _tidy_block(block: JsonObject) -> JsonObject:
    block = without_nulls(block)
    if block.get("type") not in ("image", "image_url"):
        return block
    if isinstance(block.get("image"), dict):
        return block | {"image": reference_of(block["image"])}
    if "image" not in block and (names := {"path", "url", "image_url"} & block.keys()):
        rest = {name: value for name, value in block.items() if name not in names}
        return rest | {"type": "image", "image": reference_of({name: block[name] for name in names})}
    return block


def without_nulls(data: JsonObject) -> JsonObject:
    """An object without its nulls; those within it stay."""
    return {name: value for name, value in data.items() if value is not None}


def place_images(messages: list[Message], images: Sequence[str]) -> list[Message]:
    """Messages that show a row's images; what stays as it is is not copied.

    Raises:
        ValueError: if the images are not as many as the places for them, in one line.
    """
    if not images:
        return messages
    asked = [k for k, message in enumerate(messages) if isinstance(message, dict) and message.get("role") == "user"]
    if not asked:
        raise ValueError("has an image, but no question")
    blocks = {k: list(_blocks(messages[k].get("content"))) for k in asked}
    shown = [block for k in asked for block in blocks[k] if isinstance(block, dict) and block.get("type") == "image"]
    named = [block["image"] for block in shown if block.get("image") is not None]
    places = len(shown) - len(named)
    left = [image for image in images if image not in named]
    if not places and not named:
        others = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") in ("assistant", "tool")]
        if TAG in str(others) and KEEP_TAG not in os.environ:
            raise ValueError(f"{TAG} stands in another's message, not in the user's; move it into the question")
        first = messages[asked[0]].get("content")
        text: list[Json] = first if isinstance(first, list) else [{"type": "text", "text": first}] if first else []
        blocks = {asked[0]: [*({"type": "image", "image": image} for image in images), *text]}
    elif not places and left:
        raise ValueError(f"no image block shows the row's image {left[0][:200]}; name it in one, or remove it")
    elif not places:
        return messages
    elif places != len(left):
        raise ValueError(
            f"number of images: {len(left)}, of places for them: {places} ({TAG} in the user's texts, or image blocks "
            "without one); make them the same"
        )
    else:
        for block, image in zip((b for b in shown if b.get("image") is None), left, strict=True):
            block["image"] = image
    return [message | {"content": blocks[k]} if k in blocks else message for k, message in enumerate(messages)]


def _blocks(content: Json) -> Iterator[Json]:
    """A message's blocks, each `<image>` of its texts an image block without an image; those are copies."""
    for block in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        if not isinstance(block, dict):
            yield block
        elif block.get("type") == "image":
            yield dict(block)
        elif block.get("type") == "text" and isinstance(block.get("text"), str) and TAG in block["text"]:
            for number, text in enumerate(block["text"].split(TAG)):
                if number:
                    yield {"type": "image"}
                # The line breaks that set a placeholder apart from the text are no part of the question.
                if text := text.strip("\n"):
                    yield block | {"text": text}
        else:
            yield block
