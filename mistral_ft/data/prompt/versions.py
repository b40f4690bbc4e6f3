"""What differs between the versions of Mistral's prompt, as data: `encoder.py` and the template are written from it.

Source: mistral-common's `InstructTokenizerV1` to `V13` and its request normalizers, which the tests hold every version
against. All versions share the frame

    <s>[INST]user[/INST]assistant</s>[INST]user[/INST]

with control tokens that no text can turn into. Only in v1 is [INST] a piece of text like any other.
"""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mistral_ft.errors import UserError
from mistral_ft.files import read_settings


@dataclass(frozen=True)
class PromptVersion:
    """One version's layout.

    Attributes:
        name: as in tekken.json.
        models: for whom it is.
        inst_is_text: whether "[INST] … [/INST]" is text around the user's words instead of control tokens.
        system: where system messages go: "own" brackets, or in front of the "first" or the "last" user's words.
        tools: the user's message that the tools stand before, "first" or "last"; "" if the version knows no tools.
        calls: how calls are written: a JSON "list", or "each" by itself, "each with id" if it has one.
        results: how a tool's result is written: as "json", as "id and text", or as "text".
        text_with_calls: whether a message may have both.
        sorted_results: whether results are put in the order of the calls they answer.
        strips_answers: whether spaces at an answer's end are left out.
        thinking: whether it writes thinking between [THINK] and [/THINK], if the vocabulary has these.
    """

    name: str
    models: str
    inst_is_text: bool = False
    system: str = "own"
    tools: str = "last"
    calls: str = "list"
    results: str = "id and text"
    text_with_calls: bool = True
    sorted_results: bool = False
    strips_answers: bool = True
    thinking: bool = False

    @property
    def control_tokens(self) -> list[str]:
        """The control tokens that it cannot do without."""
        names = ["<s>", "</s>"]
        names += [] if self.inst_is_text else ["[INST]", "[/INST]"]
        names += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"] if self.system == "own" else []
        if not self.tools:
            return names
        names += "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]".split()
        names += ["[TOOL_CONTENT]"] if self.results == "id and text" else []
        names += ["[ARGS]"] if self.calls != "list" else []
        return names + (["[CALL_ID]"] if self.calls == "each with id" else [])


VERSIONS = {
    version.name: version
    for version in (
        PromptVersion("v1", "Mistral-7B-Instruct v0.1 and v0.2", inst_is_text=True, system="first", tools="",
                      strips_answers=False),
        PromptVersion("v3", "Mistral-7B-Instruct v0.3, Nemo, Pixtral-12B", system="last", results="json",
                      text_with_calls=False),
        PromptVersion("v7", "Mistral-Small 3.1"),
        PromptVersion("v11", "Mistral-Small 3.2", calls="each with id", sorted_results=True),
        PromptVersion("v13", "Magistral, Devstral and Ministral 3", tools="first", calls="each", results="text",
                      sorted_results=True, thinking=True),
    )
}  # fmt: skip


def find_version(folder: Path, tokenizer: Tokenizer) -> PromptVersion:
    """The version that a model's folder asks for: what tekken.json says, or else what the vocabulary has room for.

    Raises:
        UserError: if it is none of `VERSIONS`.
    """
    tekken = folder / "tekken.json"
    if tekken.is_file():
        config = read_settings(tekken).get("config")
        name = config.get("version") if isinstance(config, dict) else None
        if name not in VERSIONS:
            raise UserError(f"{tekken}: version {name}; supported are {', '.join(VERSIONS)}")
        return VERSIONS[name]
    # Newest first. v11 and v13 differ in how they treat tools, and in [THINK].
    marks = {"v13": "[THINK]", "v11": "[ARGS]", "v7": "[SYSTEM_PROMPT]", "v3": "[INST]"}
    found = (name for name, mark in marks.items() if tokenizer.token_to_id(mark) is not None)
    return VERSIONS[next(found, "v1")]
