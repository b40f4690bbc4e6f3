"""LLaMA-Factory's dataset_info.json: where a set's rows are, and which of their columns and tags mean what.

Its rows become rows of the alpaca or the openai format, which `formats.convert` turns into records.
"""

import json
from pathlib import Path
from typing import NamedTuple

from mistral_ft.data.row_images import IMAGE_COLUMNS
from mistral_ft.errors import UserError
from mistral_ft.files import Json, JsonObject

INFO = "dataset_info.json"
# What LLaMA-Factory calls a part of a row, and what the alpaca format calls it.
ALPACA = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
    "tools": "tools", "images": "images",
}  # fmt: skip
CHAT = {"messages": "messages", "system": "system", "tools": "tools", "images": "images"}
TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
OPENAI_TAGS = TAGS | {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "observation_tag": "tool",
}  # fmt: skip
ROLES = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call",
    "system_tag": "system",
}  # fmt: skip
# Columns without which a row is another one: if the set does not name one of them, its rows must not have it.
PARTS = {*IMAGE_COLUMNS, "history", "system", "tools", "videos", "audios"}
LEARNED_OTHERWISE = {
    "chosen": "preferences", "rejected": "preferences", "kto_tag": "preferences", "videos": "videos", "audios": "audio",
}  # fmt: skip


class ForeignSet(NamedTuple):
    """A set of dataset_info.json.

    Attributes:
        path: the file of its rows.
        form: the format that `row` gives, "alpaca" or "openai".
        columns: the set's column for each part of a row.
        tags: what the set calls the parts and the speakers of a turn.
    """

    path: Path
    form: str
    columns: dict[str, str]
    tags: dict[str, str]

    def row(self, row: JsonObject) -> JsonObject:
        """One row in the names of `form`; raises ValueError if it has a part that the set does not name."""
        parts = PARTS | ({"input"} if self.form == "alpaca" else set())
        if unread := next((name for name in sorted(parts - set(self.columns.values())) if row.get(name)), None):
            raise ValueError(f"has `{unread}`, which `columns` of {INFO} does not name; name it there, or remove it")
        names = ALPACA if self.form == "alpaca" else CHAT
        found = {names[part]: row.get(column) for part, column in self.columns.items()}
        rest = {name: value for name, value in row.items() if name not in self.columns.values()}
        row = rest | {name: value for name, value in found.items() if value not in (None, "", [])}
        return row if self.form == "alpaca" else self._chat(row)

    def _chat(self, row: JsonObject) -> JsonObject:
        turns = row.get("messages")
        if not isinstance(turns, list):
            raise ValueError(f"`{self.columns['messages']}` must be a list with something in it")
        role_tag, content_tag = self.tags["role_tag"], self.tags["content_tag"]
        roles = {self.tags[tag]: role for tag, role in ROLES.items()}
        messages = []
        for number, turn in enumerate(turns, 1):
            if not isinstance(turn, dict) or content_tag not in turn or role_tag not in turn:
                raise ValueError(f"turn {number}: expected an object with `{role_tag}` and `{content_tag}`")
            if turn[role_tag] not in list(roles):  # which may be no string
                known = ", ".join(roles)
                raise ValueError(f"turn {number}: unknown `{role_tag}` {turn[role_tag]!r}; expected {known}")
            rest = {name: value for name, value in turn.items() if name not in (role_tag, content_tag)}
            messages.append(rest | {"role": roles[turn[role_tag]], "content": turn[content_tag]})
        # The set's own system message counts only where the turns begin with none.
        if row.get("system") and (not messages or messages[0]["role"] != "system"):
            messages.insert(0, {"role": "system", "content": row["system"]})
        return {name: value for name, value in row.items() if name != "system"} | {"messages": messages}


def split_name(source: Path) -> tuple[Path, str]:
    """dataset_info.json and the name of the set, empty if there is none, of a path that may end with ":NAME"."""
    before, mark, name = str(source).rpartition(f"{INFO}:")
    return (Path(f"{before}{INFO}"), name) if mark else (source, "")


def find_set(source: Path) -> ForeignSet:
    """The set that `<folder>/dataset_info.json:NAME` names; without a name the only one.

    Raises:
        UserError: if there is no such set, or a part of what it says is not read here.
    """
    info, name = split_name(source)
    try:
        sets = json.loads(info.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{info}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{info}: not JSON: {error}") from None
    if not isinstance(sets, dict) or not sets or not all(isinstance(entry, dict) for entry in sets.values()):
        raise UserError(f'{info}: expected {{"NAME": {{"file_name": …}}}} as LLaMA-Factory has it')
    if (not name and len(sets) > 1) or (name and name not in sets):
        wrong = f"has no set {name}" if name else f"has {len(sets)} sets"
        raise UserError(f"{info}: {wrong}; name one, {info}:NAME, of {', '.join(sorted(sets)[:20])}")
    name = name or next(iter(sets))
    try:
        return _read_entry(info.parent, sets[name])
    except ValueError as error:
        raise UserError(f"{info}: {name}: {error}") from None


def _read_entry(folder: Path, entry: JsonObject) -> ForeignSet:
    given = {key: value for key, value in entry.items() if value not in (None, "", {}, False)}
    form, columns, tags = given.get("formatting", "alpaca"), _names(given, "columns"), _names(given, "tags")
    if given.get("ranking"):
        raise ValueError("`ranking` is for training on preferences, which is not done here")
    if other := next((column for column in columns if column in LEARNED_OTHERWISE), None):
        raise ValueError(f"`{other}`: {LEARNED_OTHERWISE[other]} cannot be trained on here")
    if hub := next((key for key in given if key.endswith("_hub_url")), None):
        raise ValueError(f"`{hub}`: give the set on the hub as IN, {given[hub]}")
    if "num_samples" in given:
        raise ValueError("`num_samples`: remove it, and give --limit")
    if unknown := sorted(given.keys() - {"file_name", "formatting", "columns", "tags"} - _defaults(given)):
        raise ValueError(f"`{unknown[0]}` is not read here; remove it if the rows are the same without")
    if not isinstance(given.get("file_name"), str):
        raise ValueError("no `file_name`: the file of its rows")
    if form not in ("alpaca", "sharegpt", "openai"):
        raise ValueError(f"unknown `formatting` {form!r}; expected alpaca, sharegpt or openai")
    parts, defaults = (ALPACA, ["instruction", "input", "output"]) if form == "alpaca" else (CHAT, ["conversations"])
    if unknown := sorted(columns.keys() - parts.keys()) or sorted(tags.keys() - TAGS.keys()):
        raise ValueError(f"`{unknown[0]}` is not read for `formatting` {form}")
    usual = dict(zip(parts, defaults, strict=False))
    if columns:  # whether `input` is read beside them, LLaMA-Factory's documents and code do not agree
        usual.pop("query", None)
    columns, known = usual | columns, OPENAI_TAGS if form == "openai" else TAGS
    return ForeignSet(folder / given["file_name"], "alpaca" if form == "alpaca" else "openai", columns, known | tags)


def _defaults(entry: JsonObject) -> set[str]:
    return {"split"} if entry.get("split") == "train" else set()


def _names(entry: JsonObject, key: str) -> dict[str, str]:
    names: Json = entry.get(key, {})
    if not isinstance(names, dict) or not all(isinstance(name, str | None) for name in names.values()):
        raise ValueError(f"`{key}` must be an object of names")
    return {part: name for part, name in names.items() if name}
