"""mistral-common's side of the parity tests: its tokenizer for each version, what it encodes and what is learned of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    FinetuningAssistantMessage,
    FinetuningMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.tokens.tokenizers import image as mistral_image
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.protocol.instruct.validator import ValidationMode
from PIL import Image

from mistral_ft.prompt import IGNORE_INDEX
from tests.tiny_models import SENTENCEPIECE, write_sentencepiece, write_tekken

X = IGNORE_INDEX
PAGE = Image.new("RGB", (60, 100))  # 4 rows of 3 tokens of 28 px
GRID = (4, 3)
KINDS = ["v1", "v3", "v7", "v3-tekken", "v11-tekken", "v13-tekken"]


def write_tokenizer(folder: Path, kind: str) -> None:
    """Write a tokenizer of such a kind, such as "v3" (SentencePiece) or "v3-tekken"."""
    version, _, tekken = kind.partition("-")
    (write_tekken if tekken else write_sentencepiece)(folder, version)


@contextmanager
def load_reference(path: Path) -> Iterator[MistralTokenizer]:
    """mistral-common's tokenizer of a file, which does not look at pixels: it would need OpenCV."""
    patch = pytest.MonkeyPatch()
    patch.setattr(mistral_image, "transform_image", lambda image, size: np.zeros(1))
    yield MistralTokenizer.from_file(path, mode=ValidationMode.finetuning)
    patch.undo()


def chunks(content: Any) -> Any:
    """A message's content as mistral-common takes it."""
    make = {
        "text": lambda block: TextChunk(text=block["text"]),
        "image": lambda block: ImageChunk(image=PAGE),
        "thinking": lambda block: ThinkChunk(**block),
    }
    return [make[block["type"]](block) for block in content] if isinstance(content, list) else content


def image_count(messages: list[dict[str, Any]]) -> int:
    return sum(b["type"] == "image" for m in messages for b in m["content"] or [] if isinstance(b, dict))


def encode_prompt(reference, messages, answer=None, tools=None) -> list[int]:
    """The ids of a prompt; those of an answer too, as a last message of the assistant."""
    messages = [m | {"content": chunks(m["content"])} for m in messages]
    request = ChatCompletionRequest(messages=messages, tools=[Tool(**t) for t in tools] if tools else None)
    request = reference._instruct_request_normalizer.from_chat_completion_request(request)
    if answer is not None:
        request = InstructRequest(
            messages=[*request.messages, AssistantMessage(content=answer)],
            available_tools=request.available_tools,
            system_prompt=request.system_prompt,
        )
    return reference.instruct_tokenizer.encode_instruct(request).tokens


def encode_chat(reference, messages, tools=None) -> tuple[list[int], list[int]]:
    """Ids and labels of a chat to learn: what each message of the assistant is encoded as, if its weight is not 0."""
    kinds = {"user": UserMessage, "system": SystemMessage, "tool": ToolMessage, "assistant": FinetuningAssistantMessage}
    typed = [kinds[m["role"]](**(m | {"content": chunks(m["content"])})) for m in messages]
    reference._chat_completion_request_validator.validate_messages(typed)
    normalizer = type(reference._instruct_request_normalizer)(
        UserMessage, FinetuningAssistantMessage, ToolMessage, SystemMessage, InstructRequest[FinetuningMessage, Tool], None
    )  # fmt: skip
    request = ChatCompletionRequest[FinetuningMessage](
        messages=typed, tools=[Tool(**tool) for tool in tools] if tools else None
    )
    request = normalizer.from_chat_completion_request(request)
    ids = reference.instruct_tokenizer.encode_instruct(request).tokens
    labels, place = [X] * len(ids), 0
    for message in request.messages:
        if message.role != "assistant":
            continue
        part = reference.instruct_tokenizer.encode_assistant_message(message, False)
        place = next(k for k in range(place, len(ids)) if ids[k : k + len(part)] == part)
        if message.weight is None or message.weight:
            labels[place : place + len(part)] = part
        place += len(part)
    return ids, labels
