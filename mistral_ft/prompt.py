"""The prompt encoder: the one place where messages become token ids, for train, predict and every check.

Control tokens are put in by id; text is always encoded as text, so nothing a page or an answer says can turn into one.
The layout is that of Mistral's v7 Tekken template, as mistral-common's `InstructTokenizerV7` writes it:

    <s>[SYSTEM_PROMPT]system[/SYSTEM_PROMPT][INST]user[/INST]assistant</s>[INST]user[/INST]

An image of r x c tokens is r rows of c [IMG], each ended by [IMG_BREAK], the last by [IMG_END]. No system message is
ever added: the prompt is what the user wrote.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from mistral_ft.conversation import merge_messages, text_of, to_json, tool_calls_text
from mistral_ft.errors import UserError
from mistral_ft.files import read_settings, write_json
from mistral_ft.records import Record
from mistral_ft.references import expand_pages

IGNORE_INDEX = -100  # what torch's cross entropy leaves out

TEMPLATE_VERSION = "v7-tekken"

# Tekken's own pattern, as every tekken.json since 2024-07 has it. The tokenizer.json on the hub has another one, which
# gives wrong ids: https://github.com/huggingface/transformers/issues/42299
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

# Files that make a folder's tokenizer and processor; they go with every adapter and merged model.
PROMPT_FILES = (
    "tekken.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class ControlTokens:
    """Ids of the control tokens; each field names its token."""

    bos: int  # <s>
    eos: int  # </s>
    pad: int  # <pad>
    inst: int  # [INST]
    inst_end: int  # [/INST]
    system: int  # [SYSTEM_PROMPT]
    system_end: int  # [/SYSTEM_PROMPT]
    image: int  # [IMG]
    image_break: int  # [IMG_BREAK]
    image_end: int  # [IMG_END]
    tools: int  # [AVAILABLE_TOOLS]
    tools_end: int  # [/AVAILABLE_TOOLS]
    tool_calls: int  # [TOOL_CALLS]
    tool_results: int  # [TOOL_RESULTS]
    tool_results_end: int  # [/TOOL_RESULTS]
    tool_content: int  # [TOOL_CONTENT]


CONTROL_TOKEN_NAMES = (
    "<s> </s> <pad> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [IMG] [IMG_BREAK] [IMG_END] [AVAILABLE_TOOLS] "
    "[/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CONTENT]"
).split()


class PromptEncoder:
    """Encodes messages into ids and labels, and ids back into text.

    Args:
        tokenizer: with Tekken's pre-tokenizer pattern, as `load_tokenizer` returns it.

    Raises:
        UserError: if the vocabulary lacks a control token of the v7 template.
    """

    def __init__(self, tokenizer: Tokenizer):
        ids = [tokenizer.token_to_id(name) for name in CONTROL_TOKEN_NAMES]
        missing = [name for name, i in zip(CONTROL_TOKEN_NAMES, ids, strict=True) if i is None]
        if missing:
            raise UserError(
                f"the tokenizer has no {', '.join(missing)}; supported are v7 Tekken models such as Mistral-Small-3.1"
            )
        self.control = ControlTokens(*ids)
        self.tokenizer = tokenizer
        # Text such as "[INST]" in a page or an answer stays text.
        self.tokenizer.encode_special_tokens = True

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "PromptEncoder":
        """Load the tokenizer of a model or adapter folder."""
        return cls(load_tokenizer(folder))

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        grids: Iterable[tuple[int, int]] = (),
        expected: str | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Lay out one conversation.

        Args:
            messages: as in a checked record. Messages of the assistant with a `weight` other than 0 are learned.
            grids: (rows, columns) of image tokens, one per page in the order of the messages.
            expected: the answer to learn, a last message of the assistant.
            tools: JSON schemas of the functions the model may call.

        Returns:
            `input_ids` and `labels` of the same length. Labels are the ids of learned messages, each with its </s>;
            all else is `IGNORE_INDEX`.

        Raises:
            ValueError: if the number of grids is not the number of images.
        """
        control, grids = self.control, iter(grids)
        if expected is not None:
            messages = [*messages, {"role": "assistant", "content": expected, "weight": 1}]
        merged = merge_messages(expand_pages(messages))
        last_user = max(k for k, message in enumerate(merged) if message["role"] == "user")
        ids, labels = [control.bos], [IGNORE_INDEX]
        for k, message in enumerate(merged):
            text = text_of(message)
            if message["role"] == "system":
                part = [control.system, *self._text(text), control.system_end]
            elif message["role"] == "user":
                part = [control.inst, *self._user(message["content"], grids), control.inst_end]
                if tools and k == last_user:
                    part = [control.tools, *self._text(to_json(tools)), control.tools_end, *part]
            elif message["role"] == "assistant":
                # mistral-common strips answers on the right, so that </s> follows the last word.
                part = self._text(text.rstrip(" "))
                if message.get("tool_calls"):
                    part += [control.tool_calls, *self._text(tool_calls_text(message["tool_calls"]))]
                part.append(control.eos)
            else:
                call_id = message.get("tool_call_id") or ""
                part = [control.tool_results, *self._text(call_id), control.tool_content, *self._text(text)]
                part.append(control.tool_results_end)
            ids += part
            learned = message["role"] == "assistant" and message.get("weight")
            labels += part if learned else [IGNORE_INDEX] * len(part)
        if next(grids, None) is not None:
            raise ValueError("more image grids than images")
        return ids, labels

    def encode_text(self, text: str) -> tuple[list[int], list[int]]:
        """Lay out plain text, all of which is learned: <s>text</s>.

        Returns:
            `input_ids` and `labels` of the same length; only <s>, which nothing comes before, has no label.
        """
        ids = [*self._text(text), self.control.eos]
        return [self.control.bos, *ids], [IGNORE_INDEX, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, without control tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _user(self, blocks: list[dict[str, Any]], grids: Iterable[tuple[int, int]]) -> list[int]:
        # mistral-common: an image that follows nothing but text moves to the front.
        *before, final = [block["type"] for block in blocks] or [None]
        if final == "image" and before and "image" not in before:
            blocks = [blocks[-1], *blocks[:-1]]
        ids: list[int] = []
        for block in blocks:
            if block["type"] == "text":
                ids += self._text(block["text"])
                continue
            grid = next(grids, None)
            if grid is None:
                raise ValueError("fewer image grids than images")
            ids += self.image_tokens(*grid)
        return ids

    def image_tokens(self, rows: int, columns: int) -> list[int]:
        """The ids that stand for an image of `rows` x `columns` tokens: rows * (columns + 1) of them."""
        control = self.control
        ids = ([control.image] * columns + [control.image_break]) * rows
        ids[-1] = control.image_end
        return ids


def encode_record(
    encoder: PromptEncoder, record: Record, grids: Sequence[tuple[int, int]], with_answer: bool
) -> tuple[list[int], list[int]]:
    """`input_ids` and `labels` of a record, with its answers to learn or up to where the model is to speak."""
    if record.text is not None:
        return encoder.encode_text(record.text)
    messages = record.conversation if with_answer else record.messages
    return encoder.encode(messages, grids, tools=record.data.get("tools"))


def length_problem(tokens: int, image_tokens: int, images: int, max_seq_length: int) -> str | None:
    """Why a record of so many tokens, `image_tokens` of them for its images, cannot be trained; None if it can."""
    if tokens <= max_seq_length:
        return None
    return (
        f"{tokens} tokens ({image_tokens} of them for {images} images) are more than --max_seq_length "
        f"{max_seq_length}; raise it, or shorten the record"
    )


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The folder's tokenizer with Tekken's pre-tokenizer pattern, whatever pattern its tokenizer.json has.

    Raises:
        UserError: if the folder has neither tokenizer.json nor tekken.json, or the version is not v7.
    """
    folder = Path(folder)
    tekken, fast = folder / "tekken.json", folder / "tokenizer.json"
    pattern = TEKKEN_PATTERN
    if tekken.is_file():
        config = read_settings(tekken).get("config")
        version = config.get("version") if isinstance(config, dict) else None
        if version != "v7" or not isinstance(config.get("pattern"), str):
            raise UserError(f"{tekken}: version {version}; supported is v7, that of Mistral-Small-3.1")
        pattern = config["pattern"]
    if fast.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(fast))
        except Exception as error:  # tokenizers raises nothing more special
            raise UserError(f"{fast}: broken: {error}") from None
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif tekken.is_file():
        from transformers.integrations.mistral.tokenizer import MistralConverter  # slow to import

        tokenizer = MistralConverter(vocab_file=str(tekken)).converted()
    else:
        raise UserError(f"{folder}: has neither tokenizer.json nor tekken.json, so it is no model folder")
    return tokenizer


def save_prompt_files(base: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Write the tokenizer, processor and chat template that reproduce the encoder's ids into `folder`.

    The base's own files are copied where they do. Its tokenizer.json gets the right pattern, and its chat template,
    which may add a default system message with a date, is replaced by one that writes what the encoder writes.
    """
    base, folder = Path(base), Path(folder)
    for name in PROMPT_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    tokenizer = load_tokenizer(base)
    tokenizer.encode_special_tokens = False
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    shutil.copyfile(CHAT_TEMPLATE, folder / "chat_template.jinja")

    config_path = folder / "tokenizer_config.json"
    config = read_settings(config_path) if config_path.is_file() else {}
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    for name, token in {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}.items():
        config.setdefault(f"{name}_token", token)
    config.pop("chat_template", None)
    # Tells transformers that the pattern is right, so that it neither warns nor asks for the flag.
    config["fix_mistral_regex"] = True
    write_json(config_path, config)
