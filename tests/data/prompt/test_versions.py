"""Every version of Mistral's prompt: ids and labels as mistral-common writes them, on the tokenizer files it ships."""

import random
from pathlib import Path

import pytest

pytest.importorskip("mistral_common")  # not to be had for Python 3.10
pytest.importorskip("sentencepiece")

import numpy as np
from jinja2.exceptions import TemplateError
from mistral_common.exceptions import MistralCommonException
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
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers import image as mistral_image
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mistral_ft.data.prompt.encoder import IGNORE_INDEX, PromptEncoder, encode_record
from mistral_ft.data.prompt.files import save_prompt_files
from mistral_ft.data.records import Record, checked
from mistral_ft.errors import UserError
from tests.conftest import TINY
from tests.helpers.conversations import (
    CALL,
    CALL_2,
    CHATS,
    CONVERSATIONS,
    NASTY,
    THINKING_CHATS,
    TOOLS,
    assistant,
    system,
    text,
    thinking,
    user,
)
from tests.helpers.tiny_models import SENTENCEPIECE, write_sentencepiece, write_tekken

X = IGNORE_INDEX
PAGE = Image.new("RGB", (60, 100))  # 4 rows of 3 tokens of 28 px
GRID = (4, 3)
KINDS = ["v1", "v3", "v7", "v3-tekken", "v7-tekken", "v11-tekken", "v13-tekken"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory) -> Path:
    if kind == "v7-tekken":
        return TINY
    path = tmp_path_factory.mktemp(kind)
    version, _, tekken = kind.partition("-")
    (write_tekken if tekken else write_sentencepiece)(path, version)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return PromptEncoder.from_folder(folder)


@pytest.fixture(scope="module")
def reference(kind, folder):
    patch = pytest.MonkeyPatch()
    patch.setattr(mistral_image, "transform_image", lambda image, size: np.zeros(1))  # needs OpenCV
    path = folder / "tekken.json" if "tekken" in kind else SENTENCEPIECE[kind]
    yield MistralTokenizer.from_file(path, mode=ValidationMode.finetuning)
    patch.undo()


def chunks(content):
    """A message's content as mistral-common takes it."""
    make = {
        "text": lambda block: TextChunk(text=block["text"]),
        "image": lambda block: ImageChunk(image=PAGE),
        "thinking": lambda block: ThinkChunk(**block),
    }
    return [make[block["type"]](block) for block in content] if isinstance(content, list) else content


def reference_ids(reference, messages, answer, tools) -> list[int] | None:
    """What mistral-common encodes; None if it refuses."""
    try:
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
    except (MistralCommonException, ValueError, AssertionError):
        return None


def learned_by_reference(reference, messages, tools) -> tuple[list[int], list[int]] | None:
    """Ids and labels of a chat by mistral-common, None if it refuses: of each answer, if its weight is not 0, all."""
    kinds = {"user": UserMessage, "system": SystemMessage, "tool": ToolMessage, "assistant": FinetuningAssistantMessage}
    request_class = InstructRequest[FinetuningMessage, Tool]
    normalizer = type(reference._instruct_request_normalizer)(
        UserMessage, FinetuningAssistantMessage, ToolMessage, SystemMessage, request_class, None
    )
    try:
        typed = [kinds[m["role"]](**(m | {"content": chunks(m["content"])})) for m in messages]
        reference._chat_completion_request_validator.validate_messages(typed)
        request = ChatCompletionRequest[FinetuningMessage](
            messages=typed, tools=[Tool.from_openai(tool) for tool in tools] if tools else None
        )
        request = normalizer.from_chat_completion_request(request)
        ids = reference.instruct_tokenizer.encode_instruct(request).tokens
    except (MistralCommonException, ValueError, AssertionError):
        return None
    labels, place = [X] * len(ids), 0
    for message in request.messages:
        if message.role == "assistant":
            part = reference.instruct_tokenizer.encode_assistant_message(message, False)
            place = next(k for k in range(place, len(ids)) if ids[k : k + len(part)] == part)
            if message.weight != 0:
                labels[place : place + len(part)] = part
            place += len(part)
    return ids, labels


def learned(encoder, messages, tools) -> tuple[list[int], list[int]]:
    """Ids and labels of a chat, the whole way from a row of a data file."""
    record = Record(Path("a.jsonl"), 1, checked({"messages": messages, "tools": tools}), Path())
    return encode_record(encoder, record, [GRID] * image_count(messages), with_answer=True)


def image_count(messages) -> int:
    return sum(b["type"] == "image" for m in messages for b in m["content"] or [] if isinstance(b, dict))


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_ids_and_labels_are_those_of_mistral_common(kind, encoder, reference, number):
    messages, answer, tools = CONVERSATIONS[number]
    if kind == "v1" and tools:
        # mistral-common leaves them out without a word
        with pytest.raises(ValueError, match="of version v1, knows no tool"):
            encoder.encode(messages, [], answer, tools)
        return
    expected = reference_ids(reference, messages, answer, tools)
    if expected is None and (images := image_count(messages)) and "tekken" not in kind:
        # A model with such a tokenizer has no vision tower: check_images has refused the record.
        assert images > 0
        return
    if expected is None:
        with pytest.raises(ValueError, match="text and tool calls in one message"):
            encoder.encode(messages, [], answer, tools)
        return
    ids, labels = encoder.encode(messages, [GRID] * image_count(messages), answer, tools)
    assert ids == expected
    stripped = answer if answer is None or kind == "v1" else answer.rstrip(" ")
    learned = [] if answer is None else [*encoder._text(stripped), 2]
    assert labels == [X] * (len(ids) - len(learned)) + learned


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_learned_as_mistral_common_encodes_them(kind, encoder, reference, name):
    messages, tools = CHATS[name]
    refused = None
    if kind == "v1" and tools:
        refused = "the model's prompt, of version v1, knows no tools"  # mistral-common leaves tools out without a word
    elif kind == "v1" and image_count(messages):
        refused = "the model's prompt, of version v1, knows no images"
    elif kind.startswith("v3") and name == "text and calls":
        refused = "text and tool calls in one message: the model's prompt, v3, takes one of them"
    if refused:
        with pytest.raises(ValueError, match=f"^{refused}$"):
            learned(encoder, messages, tools)
        assert name == "bare tools" or learned_by_reference(reference, messages, tools) is None
        return
    expected = learned_by_reference(reference, messages, tools)
    if expected is None:
        # A model with such a tokenizer has no vision tower: check_images has refused the record.
        assert image_count(messages) > 0
        assert "tekken" not in kind
        return
    assert learned(encoder, messages, tools) == expected


def test_an_answer_without_weight_and_one_of_weight_1_are_joined(encoder):
    # mistral-common tells them apart, and would write a </s> between them.
    answers = [assistant("b"), assistant("c", weight=1)]
    joined = [assistant("b\n\nc")]
    assert learned(encoder, [user("a"), *answers], None) == learned(encoder, [user("a"), *joined], None)


@pytest.mark.parametrize("name", THINKING_CHATS)
def test_thinking_is_learned_as_mistral_common_encodes_it(kind, encoder, reference, name):
    messages, tools = THINKING_CHATS[name]
    expected = learned_by_reference(reference, messages, tools)
    if kind != "v13-tekken":
        assert expected is None
        version = kind.removesuffix("-tekken")
        with pytest.raises(ValueError, match=rf"^thinking: the model's prompt, of version {version}, has no \[THINK\]"):
            learned(encoder, messages, None)
        return
    assert learned(encoder, messages, tools) == expected


def test_most_conversations_are_compared(encoder, reference):
    found = [reference_ids(reference, *conversation) is not None for conversation in CONVERSATIONS]
    assert sum(found) >= 60


def test_random_strings_give_the_ids_of_mistral_common(encoder, reference):
    rng = random.Random(0)
    letters = "aB1 \n\t.'é中🎉/[]<>▁"
    for _ in range(300):
        parts = rng.choices([*letters, *NASTY, " the", "INST", "IMG]", "</s"], k=rng.randint(1, 12))
        question, answer = "".join(parts), "".join(rng.sample(parts, len(parts))).rstrip(" ") or "x"
        messages = [system(answer), user(question)]
        assert encoder.encode(messages, expected=answer)[0] == reference_ids(reference, messages, answer, None)


def test_plain_text_gives_the_ids_of_mistral_common(encoder, reference):
    for string in filter(None, NASTY):
        ids, labels = encoder.encode_text(string)
        assert ids == reference.instruct_tokenizer.tokenizer.encode(string, bos=True, eos=True)
        assert labels == [X, *ids[1:]]
        assert encoder.decode(ids) == string


def test_look_alikes_stay_text(kind, encoder):
    control = {i for i in vars(encoder.control).values() if i is not None}
    for string in NASTY:
        assert not control & set(encoder._text(string))
    frame = [i for i in encoder.encode([user("[INST]a[/INST]</s><s>")], expected="</s>[INST]")[0] if i in control]
    assert frame == ([1, 2] if kind == "v1" else [1, 3, 4, 2])


def test_calls_decode_to_what_the_row_says(kind, encoder):
    if kind == "v1":
        return
    labels = encoder.encode([user("a"), assistant("", tool_calls=[CALL, CALL_2], weight=1)])[1]
    call_ids = ({}, {}) if kind == "v13-tekken" else ({"id": "abcdefghi"}, {"id": "123456789"})
    written = [
        {"name": "total", "arguments": {"invoice": "№ 7"}} | call_ids[0],
        {"name": "date", "arguments": {}} | call_ids[1],
    ]
    assert encoder.decode([i for i in labels if i != X]) == str(written).replace("'", '"')


def test_exact_ids_of_each_version(kind, encoder):
    """By hand, so that a change in both libraries shows."""
    ids, labels = encoder.encode([system("S"), user("a"), assistant("b"), user("c")], expected="d")
    s, a, b, c, d = (encoder._text(letter) for letter in "Sabcd")
    if kind == "v1":
        first = encoder._text("[INST] S\n\na [/INST]")
        assert ids == [1, *first, *b, 2, *encoder._text("[INST] c [/INST]"), *d, 2]
    elif kind.startswith("v3"):
        assert ids == [1, 3, *a, 4, *b, 2, 3, *encoder._text("S\n\nc"), 4, *d, 2]
    else:
        marks = [encoder.tokenizer.token_to_id(name) for name in ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")]
        assert ids == [1, marks[0], *s, marks[1], 3, *a, 4, *b, 2, 3, *c, 4, *d, 2]
    assert labels == [X] * (len(ids) - len(d) - 1) + [*d, 2]


def test_tools_stand_where_the_version_wants_them(kind, encoder):
    if kind == "v1":
        return
    ids, _ = encoder.encode([user("a"), assistant("b"), user("c")], tools=TOOLS)
    at = ids.index(encoder.control.tools)
    assert at == (1 if kind == "v13-tekken" else 1 + 2 + len(encoder._text("a")) + len(encoder._text("b")) + 1)


def test_the_saved_folder_gives_the_ids_with_transformers(kind, folder, encoder, tmp_path):
    save_prompt_files(folder, tmp_path)
    again = PromptEncoder.from_folder(tmp_path)
    assert (again.version, again.template, again.control) == (encoder.version, encoder.template, encoder.control)
    tokenizers = [PreTrainedTokenizerFast.from_pretrained(tmp_path)]
    if "tekken" not in kind:  # beside a tekken.json, transformers takes mistral-common if that is installed
        tokenizers.append(AutoTokenizer.from_pretrained(tmp_path))
    compared = 0
    unsorted = [chat for name, chat in THINKING_CHATS.items() if name != "before text and calls"]
    without_weights = [([m | {"weight": None} for m in messages], None, tools) for messages, tools in unsorted]
    for messages, _, tools in [*CONVERSATIONS, *without_weights]:
        images = image_count(messages)
        if any(mark in str([messages, tools]) for mark in ("[I", "</s>", "<pad>", "[TOOL")):
            continue  # a template is text: control tokens in it become real ones, which is why training has an encoder
        try:
            expected = encoder.encode(messages, [(1, 1)] * images, tools=tools)[0]
        except ValueError:
            continue
        if images and "tekken" not in kind:
            continue
        for tokenizer in tokenizers:
            ids = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
            # One [IMG] stands for the whole image until the processor widens it; ours is one token and [IMG_END].
            assert ids == [i for i in expected if not images or i != encoder.control.image_end], messages
        compared += 1
    assert compared >= 60 if "tekken" in kind else compared >= 45


def test_a_saved_template_refuses_thinking_where_the_encoder_does(kind, folder, tmp_path):
    save_prompt_files(folder, tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages = [system([thinking("a")]), user("b")]
    if kind == "v13-tekken":
        assert tokenizer.apply_chat_template(messages, tokenize=False) == (
            "<s>[SYSTEM_PROMPT][THINK]a[/THINK][/SYSTEM_PROMPT][INST]b[/INST]"
        )
        return
    with pytest.raises(TemplateError, match=rf"thinking: the prompt of version {kind[:2]}.* has no \[THINK\]"):
        tokenizer.apply_chat_template(messages)


def test_thinking_in_the_shape_of_the_api(tmp_path):
    write_tekken(tmp_path, "v13")
    encoder = PromptEncoder.from_folder(tmp_path)
    parts = thinking([text("a\n"), text(""), text("b")], closed=None)
    ids, labels = learned(encoder, [user("c"), assistant([parts, text("d")])], None)
    c, d = encoder._text("c"), encoder._text("d")
    think, think_end = (encoder.tokenizer.token_to_id(name) for name in ("[THINK]", "[/THINK]"))
    answer = [think, *encoder._text("a\nb"), think_end, *d, 2]
    assert ids == [1, 3, *c, 4, *answer]
    assert labels == [X, X, X, X, *answer]
    assert encoder.decode(answer) == "d"
    assert encoder.decode_thinking(answer) == "a\nb"
    assert encoder.thought(answer) == [True] * (len(answer) - 2) + [False, False]
    # cut off
    assert encoder.decode(answer[:-3]) == ""
    assert encoder.decode_thinking(answer[:-3]) == "a\nb"
    # what is no thinking
    assert encoder.decode([*d, 2]) == "d"
    assert encoder.decode_thinking([*d, 2]) == ""


def test_a_vocabulary_without_think_has_no_place_for_thinking(tmp_path):
    write_tekken(tmp_path, "v13")
    path = tmp_path / "tekken.json"
    path.write_text(path.read_text(encoding="utf-8").replace("THINK]", "UNUSED]"), encoding="utf-8")
    encoder = PromptEncoder.from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"^thinking: the model's prompt, of version v13, has no \[THINK\]; leave"):
        encoder.encode([user("a"), assistant([thinking("b")])])


def test_a_saved_tokenizer_decodes_as_the_encoder(folder, encoder, tmp_path):
    save_prompt_files(folder, tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.decode(encoder._text("  two, Ångström 🎉\n")) == "  two, Ångström 🎉\n"
    assert tokenizer.pad_token_id == encoder.control.pad < len(tokenizer)


def test_newer_versions_are_refused(tmp_path):
    write_tekken(tmp_path, "v15")
    with pytest.raises(UserError, match=r"tekken.json: version v15; supported are v1, v3, v7, v11, v13"):
        PromptEncoder.from_folder(tmp_path)


def test_text_beside_calls_has_no_place_in_v3(tmp_path):
    write_tekken(tmp_path, "v3")
    with pytest.raises(ValueError, match="text and tool calls in one message: the model's prompt, v3, takes one of"):
        PromptEncoder.from_folder(tmp_path).encode([user([text("a")]), assistant("so:", tool_calls=[CALL])])
