"""Every version of Mistral's prompt: ids and labels as mistral-common writes them, on the tokenizer files it ships."""

import random
from pathlib import Path

import pytest

pytest.importorskip("mistral_common")  # not to be had for Python 3.10
pytest.importorskip("sentencepiece")

import numpy as np
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.tokens.tokenizers import image as mistral_image
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mistral_ft.errors import UserError
from mistral_ft.prompt import IGNORE_INDEX, PromptEncoder, save_prompt_files
from tests.conversations import CALL, CALL_2, CONVERSATIONS, NASTY, TOOLS, assistant, system, text, user
from tests.tiny_models import SENTENCEPIECE, write_sentencepiece, write_tekken

X = IGNORE_INDEX
PAGE = Image.new("RGB", (60, 100))  # 4 rows of 3 tokens of 28 px
GRID = (4, 3)
KINDS = ["v1", "v3", "v7", "v3-tekken", "v11-tekken", "v13-tekken"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory) -> Path:
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
    yield MistralTokenizer.from_file(folder / "tekken.json" if "tekken" in kind else SENTENCEPIECE[kind])
    patch.undo()


def reference_ids(reference, messages, answer, tools) -> list[int] | None:
    """What mistral-common encodes; None if it refuses."""

    def chunks(content):
        if not isinstance(content, list):
            return content
        return [TextChunk(text=b["text"]) if b["type"] == "text" else ImageChunk(image=PAGE) for b in content]

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
    for messages, _, tools in CONVERSATIONS:
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
