"""Token ids equal mistral-common's own, and labels cover the answer and nothing else."""

import random
from pathlib import Path

import pytest

pytest.importorskip("mistral_common")  # not to be had for Python 3.10

from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.tokens.tokenizers import image as mistral_image
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mistral_ft.errors import UserError
from mistral_ft.prompt import IGNORE_INDEX, PromptEncoder, save_prompt_files
from mistral_ft.records import check_record
from tests.conversations import CONVERSATIONS, IMAGE, NASTY, TOOLS, assistant, system, text, user

TINY = Path("models/tiny")
X = IGNORE_INDEX
PAGE = Image.new("RGB", (60, 100))  # 4 rows of 3 tokens of 28 px
GRID = (4, 3)


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder.from_folder(TINY)


@pytest.fixture(scope="module")
def reference():
    # The pixels do not matter here, and mistral-common needs OpenCV to make them.
    patch = pytest.MonkeyPatch()
    patch.setattr(mistral_image, "transform_image", lambda image, size: None)
    yield MistralTokenizer.from_file(TINY / "tekken.json")
    patch.undo()


def reference_ids(reference, messages, answer, tools) -> list[int]:
    """What mistral-common encodes; an answer is a last assistant message in its training mode."""

    def chunks(content):
        if not isinstance(content, list):
            return content
        return [TextChunk(text=b["text"]) if b["type"] == "text" else ImageChunk(image=PAGE) for b in content]

    messages = [m | {"content": chunks(m["content"])} for m in messages]
    request = ChatCompletionRequest(messages=messages, tools=[Tool(**t) for t in tools] if tools else None)
    request = reference._instruct_request_normalizer.from_chat_completion_request(request)
    if answer is not None:
        request = InstructRequest(
            messages=[*request.messages, AssistantMessage(content=answer)], available_tools=request.available_tools
        )
    return reference.instruct_tokenizer.encode_instruct(request).tokens


def test_there_are_enough_conversations():
    assert len(CONVERSATIONS) >= 60


@pytest.mark.parametrize(("messages", "answer", "tools"), CONVERSATIONS)
def test_ids_equal_those_of_mistral_common(encoder, reference, messages, answer, tools):
    data = {"messages": messages} | ({"expected": answer} if answer else {})
    check_record(data)
    images = sum(b["type"] == "image" for m in messages for b in m["content"] or [] if isinstance(b, dict))
    ids, labels = encoder.encode(messages, [GRID] * images, answer, tools)
    assert ids == reference_ids(reference, messages, answer, tools)
    assert ids.count(1) == 1
    assert ids[0] == 1
    labelled = [i for i, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]
    assert [label for label in labels if label != IGNORE_INDEX] == labelled
    assert labelled == ([*encoder._text(answer.rstrip(" ")), 2] if answer is not None else [])


def test_ids_equal_those_of_mistral_common_on_random_strings(encoder, reference):
    rng = random.Random(0)
    letters = "aB1 \n\t.'é中🎉/[]<>"
    for _ in range(500):
        parts = rng.choices([*letters, *NASTY, " the", "INST", "IMG]", "</s"], k=rng.randint(1, 12))
        question, answer = "".join(parts), "".join(rng.sample(parts, len(parts))).rstrip(" ") or "x"
        assert encoder.encode([user(question)], expected=answer)[0] == reference_ids(
            reference, [user(question)], answer, None
        )


def test_labels_are_the_answer_and_the_end_token(encoder):
    ids, labels = encoder.encode(
        [system("Be brief."), user([text("Title?"), IMAGE])], grids=[(2, 3)], expected="Decree 12"
    )
    assert ids == [
        1, 17, 98, 133, 1827, 3025, 78, 18, 3,
        10, 10, 10, 12, 10, 10, 10, 13,
        116, 1981, 95, 4, 2793, 892, 133, 64, 81, 82, 2,
    ]  # fmt: skip
    assert labels == [X] * 21 + [2793, 892, 133, 64, 81, 82, 2]


def test_history_carries_no_label(encoder):
    ids, labels = encoder.encode([user("a"), assistant("b"), user("c")], expected="d")
    assert ids == [1, 3, 129, 4, 130, 2, 3, 131, 4, 132, 2]
    assert labels == [X, X, X, X, X, X, X, X, X, 132, 2]


def test_empty_answer_is_learned_as_an_end(encoder):
    assert encoder.encode([user("a")], expected="") == ([1, 3, 129, 4, 2], [X, X, X, X, 2])


def test_decode_is_the_inverse_of_encode(encoder):
    for string in NASTY:
        assert encoder.decode(encoder._text(string)) == string


def test_a_missing_or_spare_grid_is_an_error(encoder):
    with pytest.raises(ValueError, match="fewer image grids than images"):
        encoder.encode([user([IMAGE, IMAGE])], [(1, 1)])
    with pytest.raises(ValueError, match="more image grids than images"):
        encoder.encode([user([IMAGE])], [(1, 1), (1, 1)])


def test_the_wrong_pattern_of_the_base_is_mended(tmp_path):
    base = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    save_prompt_files(TINY, tmp_path)
    mended = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    wrong, right = (t.encode("'The'", add_special_tokens=False).ids for t in (base, mended))
    assert right == PromptEncoder.from_folder(TINY)._text("'The'")
    assert wrong != right


def test_a_folder_with_tekken_only_gives_the_same_ids(tmp_path, encoder):
    (tmp_path / "tekken.json").write_bytes((TINY / "tekken.json").read_bytes())
    other = PromptEncoder.from_folder(tmp_path)
    for string in NASTY:
        assert other._text(string) == encoder._text(string)


def test_saved_folder_has_a_template_that_writes_what_the_encoder_writes(tmp_path, encoder):
    save_prompt_files(TINY, tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    compared = 0
    for messages, _, _ in CONVERSATIONS:
        if any(mark in str(messages) for mark in ("[I", "</s>", "<pad>", "[TOOL")):
            continue  # a template is text: control tokens in it become real ones, which is why training has an encoder
        images = str(messages).count("page.png")
        prompt = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        # One [IMG] stands for the whole image until the processor widens it; ours is one token and [IMG_END].
        expected = encoder.encode(messages, [(1, 1)] * images)[0]
        assert ids == [i for i in expected if i != 13], messages
        compared += 1
    assert compared >= 80


def test_the_template_writes_tools_where_the_encoder_does(tmp_path, encoder):
    save_prompt_files(TINY, tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tools = [{"type": "function", "function": {"name": "total", "parameters": {"type": "object", "properties": {}}}}]
    messages = [user("a"), assistant("b"), user("c"), user("d")]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, tools=tools)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids == encoder.encode(messages, tools=tools)[0]


def test_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither tokenizer.json nor tekken.json"):
        PromptEncoder.from_folder(tmp_path)


def test_tools_stand_before_the_last_user_message(encoder):
    ids, _ = encoder.encode([user("a"), assistant("b"), user("c")], tools=TOOLS)
    assert ids.index(5) == 6
    assert ids[ids.index(6) + 1] == 3
