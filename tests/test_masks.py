"""What is learned of whole conversations and plain text: ids as mistral-common writes them, labels as exact lists."""

from pathlib import Path

import pytest

pytest.importorskip("mistral_common")  # not to be had for Python 3.10

from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import (
    FinetuningAssistantMessage,
    FinetuningMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.normalize import InstructRequestNormalizerV7
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import MistralRequestValidatorV5, ValidationMode
from mistral_common.tokens.tokenizers import image as mistral_image
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image

from mistral_ft.formats import as_record
from mistral_ft.prompt import IGNORE_INDEX, PromptEncoder, encode_record
from mistral_ft.records import Record, check_record, image_blocks
from tests.conversations import CALL, CALL_2, IMAGE, NASTY, TOOLS, assistant, system, text, user

TINY = Path("models/tiny")
X = IGNORE_INDEX
PAGE = Image.new("RGB", (60, 100))
GRID = (4, 3)


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder.from_folder(TINY)


@pytest.fixture(scope="module")
def reference():
    patch = pytest.MonkeyPatch()
    patch.setattr(mistral_image, "transform_image", lambda image, size: None)
    yield MistralTokenizer.from_file(TINY / "tekken.json", mode=ValidationMode.finetuning)
    patch.undo()


def encoded(encoder, row) -> tuple[list[int], list[int]]:
    row = as_record(row)
    check_record(row, expected_required=True)
    record = Record(Path("a.jsonl"), 1, row, Path())
    return encode_record(encoder, record, [GRID] * len(image_blocks(record.conversation)), with_answer=True)


def reference_ids(reference, messages, tools=None):
    """Ids and labels by mistral-common: what each message of the assistant is encoded as, if its weight is not 0."""

    def content(value):
        if not isinstance(value, list):
            return value
        return [TextChunk(text=b["text"]) if b["type"] == "text" else ImageChunk(image=PAGE) for b in value]

    kinds = {"user": UserMessage, "system": SystemMessage, "tool": ToolMessage, "assistant": FinetuningAssistantMessage}
    typed = [kinds[m["role"]](**(m | {"content": content(m["content"])})) for m in messages]
    available = [Tool(**tool) for tool in tools] if tools else None
    MistralRequestValidatorV5(ValidationMode.finetuning).validate_messages(typed)
    normalizer = InstructRequestNormalizerV7(
        UserMessage,
        FinetuningAssistantMessage,
        ToolMessage,
        SystemMessage,
        InstructRequest[FinetuningMessage, Tool],
        None,
    )
    request = ChatCompletionRequest[FinetuningMessage](messages=typed, tools=available)
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


# What begins with [INST] is a question without an answer, and refused.
TEXTS = [s for s in NASTY if s.strip() and not s.startswith("[INST]")]
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"total": "12.00 €"}'}
CHATS = {
    "one turn": ([user("a"), assistant("b")], None),
    "several turns": ([user("a"), assistant("bcd"), user("e"), assistant("fgh"), user("i"), assistant("jkl")], None),
    "weight 0 first": ([user("a"), assistant("bcd", weight=0), user("e"), assistant("fgh", weight=1)], None),
    "weight 0 last": ([user("a"), assistant("bcd", weight=1), user("e"), assistant("fgh", weight=0)], None),
    "weights apart": ([user("a"), assistant("bcd", weight=0), assistant("efg", weight=1)], None),
    "two of one weight": ([user("a"), assistant("bcd", weight=1), assistant("efg", weight=1)], None),
    "system and images": ([system("S"), user([text("a"), IMAGE]), assistant("bcd"), user([IMAGE, text("e")]),
                           assistant("fgh")], None),
    "a call": ([user("a"), assistant("", tool_calls=[CALL])], TOOLS),
    "text and calls": ([user("a"), assistant("so:", tool_calls=[CALL, CALL_2])], TOOLS),
    "a call, its result and the answer": ([system("S"), user("a"), assistant(None, tool_calls=[CALL]), RESULT,
                                           assistant("12.00 €")], TOOLS),
    "a call not learned": ([user("a"), assistant("", tool_calls=[CALL], weight=0), RESULT,
                            assistant("12.00 €", weight=1)], TOOLS),
    "tools in the middle": ([user("a"), assistant("", tool_calls=[CALL]), RESULT, assistant("b"), user("cde"),
                             assistant("fgh")], TOOLS),
    **{f"nasty {k}": ([user("a"), assistant(s), user("b"), assistant(f"{s}!")], None)
       for k, s in enumerate(NASTY) if s.strip()},
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_learned_as_mistral_common_encodes_them(encoder, reference, name):
    messages, tools = CHATS[name]
    row = {"messages": messages} | ({"tools": tools} if tools else {})
    assert encoded(encoder, row) == reference_ids(reference, messages, tools)


def test_every_answer_of_a_chat_is_learned(encoder):
    ids, labels = encoded(encoder, {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]})
    assert ids == [1, 3, 129, 4, 130, 2, 3, 131, 4, 132, 2]
    assert labels == [X, X, X, X, 130, 2, X, X, X, 132, 2]


def test_weight_0_is_not_learned(encoder):
    ids, labels = encoded(encoder, {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]})
    assert ids == [1, 3, 129, 4, 130, 2, 3, 131, 4, 132, 2]
    assert labels == [X, X, X, X, X, X, X, X, X, 132, 2]


def test_weight_1_before_expected_is_learned(encoder):
    messages = [user("a"), assistant("b", weight=1), user("c")]
    ids, labels = encoded(encoder, {"messages": messages, "expected": "d"})
    assert (ids, labels) == encoded(encoder, {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]})


def test_a_call_is_learned_with_its_control_token(encoder):
    call = {"id": "123456789", "function": {"name": "f", "arguments": "{}"}}
    ids, labels = encoded(encoder, {"messages": [user("a"), assistant("b", tool_calls=[call])]})
    written = encoder._text('[{"name": "f", "arguments": {}, "id": "123456789"}]')
    assert ids == [1, 3, 129, 4, 130, encoder.control.tool_calls, *written, 2]
    assert labels == [X, X, X, X, 130, encoder.control.tool_calls, *written, 2]
    assert encoder.decode(labels[4:]) == 'b[{"name": "f", "arguments": {}, "id": "123456789"}]'


@pytest.mark.parametrize("string", TEXTS)
def test_all_of_plain_text_is_learned(encoder, reference, string):
    ids, labels = encoded(encoder, {"text": string})
    assert ids == reference.instruct_tokenizer.tokenizer.encode(string, bos=True, eos=True)
    assert labels == [X, *ids[1:]]
    assert encoder.decode(ids) == string


def test_inst_text_becomes_turns(encoder):
    turns = encoded(encoder, {"text": "<s>[INST] a [/INST] b </s>[INST] c [/INST] d </s>"})
    assert turns == encoded(encoder, {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]})


def test_prompt_and_completion_in_messages(encoder):
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    assert encoded(encoder, row) == ([1, 3, 129, 4, 130, 2, 3, 131, 4, 132, 2], [X, X, X, X, X, X, X, X, X, 132, 2])


ROUND_TRIPS = [
    *[{"messages": messages, "tools": tools or []} for messages, tools in CHATS.values()],
    *[{"messages": [user("a")], "expected": s} for s in NASTY],
    *[{"text": s} for s in TEXTS],
]


@pytest.mark.parametrize("row", ROUND_TRIPS)
def test_what_is_learned_decodes_to_what_the_row_says(encoder, row):
    _, labels = encoded(encoder, row)
    record = Record(Path("a.jsonl"), 1, as_record(row), Path())
    parts = [[]]
    for label in labels:
        if label == encoder.control.eos:
            parts.append([])
        elif label != X:
            parts[-1].append(label)
    assert [encoder.decode(part) for part in parts[:-1]] == record.learned
    assert parts[-1] == []
    if row.get("expected") is not None:
        assert record.learned == [row["expected"].rstrip(" ")]
