"""A record's tokens for people to read: stretches of one kind, learned or not."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from mistral_ft.data.prompt.encoder import IGNORE_INDEX, PromptEncoder

Kind = Literal["control", "text", "image"]


class Stretch(NamedTuple):
    """Neighbouring ids of one kind, all of which have a label or none; images that touch make one stretch."""

    kind: Kind
    learned: bool
    ids: list[int]


def stretches(encoder: PromptEncoder, ids: Sequence[int], labels: Sequence[int]) -> Iterator[Stretch]:
    """Cut what the encoder made of a record into stretches."""
    control = vars(encoder.control)
    image_ids = {control["image"], control["image_break"], control["image_end"]}

    def look(place: int) -> tuple[Kind, bool]:
        token = ids[place]
        kind: Kind = "image" if token in image_ids else "control" if token in control.values() else "text"
        return kind, labels[place] != IGNORE_INDEX

    for (kind, learned), places in itertools.groupby(range(len(ids)), look):
        yield Stretch(kind, learned, [ids[place] for place in places])


def token_texts(encoder: PromptEncoder, kind: Kind, ids: Sequence[int]) -> list[str]:
    """Each token's text, a control token's name."""
    return [(encoder.tokenizer.id_to_token(i) or "") if kind == "control" else encoder.decode([i]) for i in ids]


def mark_learned(encoder: PromptEncoder, ids: Sequence[int], labels: Sequence[int]) -> str:
    """A record as the model reads it, each learned token between ⟦ and ⟧, each image as [IMG]×tokens."""
    shown = ""
    for kind, learned, part in stretches(encoder, ids, labels):
        if learned:
            shown += "".join(f"⟦{text}⟧" for text in token_texts(encoder, kind, part))
        elif kind == "image":
            shown += f"[IMG]×{len(part)}"
        else:
            shown += encoder.decode(part) if kind == "text" else "".join(token_texts(encoder, kind, part))
    return shown
