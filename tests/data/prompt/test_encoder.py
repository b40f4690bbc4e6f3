"""The prompt encoder by example, on the embedded base's files; test_prompt_versions.py asks mistral-common."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mistral_ft.data.prompt.encoder import IGNORE_INDEX, PromptEncoder
from mistral_ft.data.prompt.files import save_prompt_files
from mistral_ft.errors import UserError
from tests.helpers.conversations import IMAGE, NASTY, TOOLS, assistant, system, text, user

TINY = Path("models/tiny")
X = IGNORE_INDEX


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder.from_folder(TINY)


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


def test_a_vocabulary_without_image_tokens_takes_text_only():
    renamed = (TINY / "tokenizer.json").read_text(encoding="utf-8").replace('"[IMG]"', '"[GONE]"')
    encoder = PromptEncoder(Tokenizer.from_str(renamed))
    assert encoder.encode([user("a")], expected="") == ([1, 3, 129, 4, 2], [X, X, X, X, 2])
    with pytest.raises(ValueError, match="^shows an image, but the model's tokenizer has no tokens for images"):
        encoder.encode([user([IMAGE])], [(1, 1)])


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
