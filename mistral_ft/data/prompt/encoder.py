"""The prompt encoder: the one place where messages become token ids, for train, predict and every check.

Control tokens are put in by id; text is always encoded as text, so nothing a page or an answer says can turn into one.
The layout follows from the model's version of Mistral's prompt (see `prompt_versions`); that of Mistral-Small 3.1 is

    <s>[SYSTEM_PROMPT]system[/SYSTEM_PROMPT][INST]user[/INST]assistant</s>[INST]user[/INST]

An image of r x c tokens is r rows of c [IMG], each ended by [IMG_BREAK], the last by [IMG_END]. No system message is
ever added: the prompt is what the user wrote.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mistral_ft.data.conversation import (
    merge_messages,
    parsed,
    said,
    text_of,
    thinking_text,
    thinks,
    to_json,
    tool_calls,
    tool_calls_text,
    tools_text,
)
from mistral_ft.data.prompt.tokenizer import is_sentencepiece, load_tokenizer
from mistral_ft.data.prompt.versions import VERSIONS, PromptVersion, find_version
from mistral_ft.data.records import Record
from mistral_ft.data.references import expand_pages
from mistral_ft.errors import UserError
from mistral_ft.files import JsonObject

IGNORE_INDEX = -100  # what torch's cross entropy leaves out
ABSENT = -1  # no token's id


@dataclass(frozen=True)
class ControlTokens:
    """Ids of the control tokens, `ABSENT` where the vocabulary has none; each field names its token."""

    bos: int  # <s>
    eos: int  # </s>
    pad: int  # <pad>, or where there is none <unk>
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
    args: int  # [ARGS]
    call_id: int  # [CALL_ID]
    think: int  # [THINK]
    think_end: int  # [/THINK]


CONTROL_TOKEN_NAMES = (
    "<s> </s> <pad> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [IMG] [IMG_BREAK] [IMG_END] [AVAILABLE_TOOLS] "
    "[/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CONTENT] [ARGS] [CALL_ID] [THINK] [/THINK]"
).split()


class PromptEncoder:
    """Encodes messages into ids and labels, and ids back into text.

    Args:
        tokenizer: as `load_tokenizer` returns it.
        version: of the prompt.

    Attributes:
        template: the version's name and the tokenizer's kind, such as "v7-tekken".

    Raises:
        UserError: if the vocabulary lacks a control token of that version.
    """

    def __init__(self, tokenizer: Tokenizer, version: PromptVersion = VERSIONS["v7"]):
        if missing := [name for name in version.control_tokens if tokenizer.token_to_id(name) is None]:
            raise UserError(f"the tokenizer has no {', '.join(missing)}, which prompts of version {version.name} need")
        found = {name: tokenizer.token_to_id(name) for name in CONTROL_TOKEN_NAMES}
        if found["<pad>"] is None:
            found["<pad>"] = tokenizer.token_to_id("<unk>")
        if version.inst_is_text:  # whatever the vocabulary has
            found["[INST]"] = found["[/INST]"] = None
        if not version.thinking:
            found["[THINK]"] = found["[/THINK]"] = None
        self.control = ControlTokens(*(ABSENT if i is None else i for i in found.values()))
        self.tokenizer, self.version = tokenizer, version
        # SentencePiece models expect a space before the first word of a text.
        self.space = " " if is_sentencepiece(tokenizer) else ""
        self.template = f"{version.name}-{'sentencepiece' if self.space else 'tekken'}"
        # Text such as "[INST]" in a page or an answer stays text.
        self.tokenizer.encode_special_tokens = True

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "PromptEncoder":
        """Load the tokenizer of a model or adapter folder."""
        tokenizer = load_tokenizer(folder)
        return cls(tokenizer, find_version(Path(folder), tokenizer))

    def encode(
        self,
        messages: Sequence[JsonObject],
        grids: Iterable[tuple[int, int]] = (),
        expected: str | None = None,
        tools: Sequence[JsonObject] | None = None,
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
            ValueError: if the number of grids is not the number of images, or the version has no place for a message.
        """
        control, version, grids_left = self.control, self.version, iter(grids)
        if expected is not None:
            messages = [*messages, {"role": "assistant", "content": expected, "weight": 1}]
        merged = merge_messages(expand_pages(messages))
        if control.think == ABSENT and any(map(thinks, merged)):
            raise ValueError(
                f"thinking: the model's prompt, of version {version.name}, has no [THINK]; "
                "leave it out, or take a model that thinks"
            )
        merged, system = self._arrange(merged)
        users = [k for k, message in enumerate(merged) if message["role"] == "user"]
        places = {"first": users[0], "last": users[-1]}
        if tools and not version.tools:
            raise ValueError(f"the model's prompt, of version {version.name}, knows no tools")
        ids, labels = [control.bos], [IGNORE_INDEX]
        for k, message in enumerate(merged):
            text = text_of(message)
            if message["role"] == "system":
                part = [control.system, *self._texts(message["content"]), control.system_end]
            elif message["role"] == "user":
                part = self._user(message["content"], grids_left, system if places.get(version.system) == k else "")
                if tools and places[version.tools] == k:
                    part = [control.tools, *self._text(tools_text(tools)), control.tools_end, *part]
            elif message["role"] == "assistant":
                if thinks(message):
                    part = self._texts(message["content"])
                else:
                    part = self._text(said(message) if version.strips_answers else text)
                part += self._calls(message.get("tool_calls") or [], beside_text=bool(text))
                part.append(control.eos)
            else:
                part = self._result(message.get("tool_call_id") or "", text)
            ids += part
            learned = message["role"] == "assistant" and message.get("weight")
            labels += part if learned else [IGNORE_INDEX] * len(part)
        if next(grids_left, None) is not None:
            raise ValueError("more image grids than images")
        return ids, labels

    def _arrange(self, merged: list[JsonObject]) -> tuple[list[JsonObject], str]:
        """Messages in the order in which the version writes them, and the system text that goes with the user's."""
        if self.version.sorted_results:
            merged = _sort_results(merged)
        if self.version.system == "own":
            return merged, ""
        texts = [text_of(message) for message in merged if message["role"] == "system"]
        rest = [message for message in merged if message["role"] != "system"]
        if rest[0]["role"] != "user":  # mistral-common: these versions begin with the user
            rest = [{"role": "user", "content": []}, *rest]
        return rest, "\n\n".join(filter(None, texts))

    def encode_text(self, text: str) -> tuple[list[int], list[int]]:
        """Lay out plain text, all of which is learned: <s>text</s>.

        Returns:
            `input_ids` and `labels` of the same length; only <s>, which nothing comes before, has no label.
        """
        return self.frame([*self._text(text), self.control.eos])

    def frame(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Lay out ids all of which are learned: a piece of plain text."""
        return [self.control.bos, *ids], [IGNORE_INDEX, *ids]

    def pieces(self, text: str, most: int) -> list[list[int]]:
        """The ids of plain text and its </s>, cut so that `frame` makes at most so many of each piece."""
        ids = self.encode_text(text)[0][1:]
        step = max(1, most - 1)
        return [ids[start : start + step] for start in range(0, len(ids), step)]

    def decode(self, ids: Sequence[int]) -> str:
        """What ids say: text without control tokens and thinking; calls as JSON, however the version writes them."""
        ids = [i for i, is_thought in zip(ids, self.thought(ids), strict=True) if not is_thought]
        if self.version.calls == "list" or self.control.tool_calls not in ids:
            return self._plain(ids)
        text, *calls = split_at(ids, self.control.tool_calls)
        return self._plain(text) + to_json([self._call(call) for call in calls])

    def decode_thinking(self, ids: Sequence[int]) -> str:
        """What ids think."""
        return self._plain(list(itertools.compress(ids, self.thought(ids))))

    def thought(self, ids: Sequence[int]) -> list[bool]:
        """Whether each id is thinking: from [THINK] to [/THINK] or, where it is not closed, to the end."""
        if self.control.think not in ids:
            return [False] * len(ids)
        found, inside = [], False
        for i in ids:
            inside = inside or i == self.control.think
            found.append(inside)
            inside = inside and i != self.control.think_end
        return found

    def _call(self, ids: list[int]) -> JsonObject:
        head, *arguments = split_at(ids, self.control.args)
        name, *call_id = split_at(head, self.control.call_id)
        call = {"name": self._plain(name), "arguments": parsed("".join(map(self._plain, arguments)))}
        return call | ({"id": self._plain(call_id[0])} if call_id else {})

    def _plain(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(self.space + text, add_special_tokens=False).ids if text else []

    def _texts(self, blocks: list[JsonObject]) -> list[int]:
        """Texts and thinking, each encoded by itself."""
        ids: list[int] = []
        for block in blocks:
            if block["type"] == "text":
                ids += self._text(block["text"])
            else:
                ids += [self.control.think, *self._text(thinking_text(block))]
                ids += [] if block.get("closed") is False else [self.control.think_end]
        return ids

    def _user(self, blocks: list[JsonObject], grids: Iterator[tuple[int, int]], system: str) -> list[int]:
        # mistral-common: an image that follows nothing but text moves to the front.
        *before, final = [block["type"] for block in blocks] or [None]
        if final == "image" and before and "image" not in before:
            blocks = [blocks[-1], *blocks[:-1]]
        if system and all(block["type"] == "text" for block in blocks):
            blocks = [{"type": "text", "text": system + "\n\n" + "".join(block["text"] for block in blocks)}]
        elif system:
            blocks = [{"type": "text", "text": system + "\n\n"}, *blocks]
        if self.version.inst_is_text:
            if any(block["type"] == "image" for block in blocks):
                raise ValueError(f"the model's prompt, of version {self.version.name}, knows no images")
            return self._text(f"[INST] {''.join(block['text'] for block in blocks)} [/INST]")
        ids = [self.control.inst]
        for block in blocks:
            if block["type"] == "text":
                ids += self._text(block["text"])
                continue
            grid = next(grids, None)
            if grid is None:
                raise ValueError("fewer image grids than images")
            ids += self.image_tokens(*grid)
        return [*ids, self.control.inst_end]

    def _calls(self, calls: Sequence[JsonObject], beside_text: bool) -> list[int]:
        control, version = self.control, self.version
        if not calls:
            return []
        if not version.tools:
            raise ValueError(f"the model's prompt, of version {version.name}, knows no tool calls")
        if beside_text and not version.text_with_calls:
            raise ValueError(
                f"text and tool calls in one message: the model's prompt, {version.name}, takes one of them"
            )
        if version.calls == "list":
            return [control.tool_calls, *self._text(tool_calls_text(calls))]
        ids: list[int] = []
        for call in tool_calls(calls):
            ids += [control.tool_calls, *self._text(call["name"])]
            if version.calls == "each with id" and "id" in call:
                ids += [control.call_id, *self._text(call["id"])]
            ids += [control.args, *self._text(to_json(call["arguments"]))]
        return ids

    def _result(self, call_id: str, text: str) -> list[int]:
        control, results = self.control, self.version.results
        if not self.version.tools:
            raise ValueError(f"the model's prompt, of version {self.version.name}, knows no tool results")
        if results == "json":
            text = to_json({"content": parsed(text or "{}"), "call_id": call_id})
        before = [*self._text(call_id), control.tool_content] if results == "id and text" else []
        return [control.tool_results, *before, *self._text(text), control.tool_results_end]

    def image_tokens(self, rows: int, columns: int) -> list[int]:
        """The ids that stand for an image of `rows` x `columns` tokens: rows * (columns + 1) of them."""
        control = self.control
        if ABSENT in (control.image, control.image_break, control.image_end):
            raise ValueError("shows an image, but the model's tokenizer has no tokens for images; leave it out")
        ids = ([control.image] * columns + [control.image_break]) * rows
        ids[-1] = control.image_end
        return ids


def _sort_results(messages: list[JsonObject]) -> list[JsonObject]:
    """Messages with each run of tool results in the order of the calls before it, as mistral-common does."""
    arranged: list[JsonObject] = []
    for is_result, group in itertools.groupby(messages, lambda message: message["role"] == "tool"):
        run = list(group)
        if is_result:
            asked = [call.get("id") for call in arranged[-1].get("tool_calls") or []]
            run.sort(key=lambda message: asked.index(i) if (i := message.get("tool_call_id")) in asked else len(asked))
        arranged += run
    return arranged


def split_at(ids: Sequence[int], mark: int) -> list[list[int]]:
    """The ids before, between and behind the marks."""
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == mark:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


def encode_record(
    encoder: PromptEncoder, record: Record, grids: Sequence[tuple[int, int]], with_answer: bool
) -> tuple[list[int], list[int]]:
    """`input_ids` and `labels` of a record, with its answers to learn or up to where the model is to speak."""
    if record.piece is not None:
        return encoder.frame(record.piece)
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
