"""Perplexity of plain text: how well a model predicts it, from what predict wrote into rows of {"text": …}.

Perplexity is exp(negative log-likelihood / tokens) over all tokens of the file (Jelinek et al. 1977): 1 is best, and a
model that chose among all N ids by lot would have N. It compares models with the same tokenizer only.
"""

import math
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from mistral_ft.errors import UserError
from mistral_ft.files import JsonObject
from mistral_ft.scoring.statistics import paired_bootstrap


@dataclass
class Texts:
    """What a file says of its plain texts.

    Attributes:
        lines: line numbers; the other arrays belong to these.
        keys: hashes of the ids, or of the texts where there is none.
        nll: negative log-likelihoods in nats, summed over a row's tokens.
        tokens: how many those are.
    """

    lines: array = field(default_factory=lambda: array("q"))
    keys: array = field(default_factory=lambda: array("q"))
    nll: array = field(default_factory=lambda: array("d"))
    tokens: array = field(default_factory=lambda: array("q"))

    def add(self, line: int, key: int, row: JsonObject) -> None:
        """Add one row that `is_scored`."""
        self.lines.append(line)
        self.keys.append(key)
        self.nll.append(row["nll"])
        self.tokens.append(row["tokens"])

    def merge(self, other: "Texts", lines: int) -> None:
        """Take over the rows of the next part of the file, which follows `lines` lines."""
        self.lines.extend(line + lines for line in other.lines)
        for name in ("keys", "nll", "tokens"):
            getattr(self, name).extend(getattr(other, name))


def is_scored(row: JsonObject) -> bool:
    """Whether a row of plain text has what predict writes."""
    nll, tokens = row.get("nll", math.nan), row.get("tokens")
    return type(nll) in (int, float) and math.isfinite(nll) and type(tokens) is int and tokens > 0


def perplexity(texts: Texts) -> JsonObject:
    """Perplexity with its 95 % interval over resampled rows, and what it follows from."""
    import numpy as np

    nll, tokens = (np.asarray(values, float)[:, None] for values in (texts.nll, texts.tokens))
    nothing = np.zeros_like(nll), np.ones_like(nll)
    ((mean, low, high),) = paired_bootstrap(nothing, (nll, tokens))
    return {
        "count": len(texts.lines),
        "tokens": sum(texts.tokens),
        "nll_per_token": mean,
        "perplexity": math.exp(mean),
        "perplexity_low": math.exp(low),
        "perplexity_high": math.exp(high),
    }


def compare_texts(first: Texts, second: Texts, names: Sequence[str | os.PathLike]) -> JsonObject:
    """Perplexity of two models on the rows that are in both files, matched by `id`, or by text where one has none.

    Args:
        names: of the two files, for messages.

    Returns:
        `count`, `before`, `after`, their `ratio` (below 1: the second is better) with `low` and `high` of its 95 %
        interval over resampled rows, `verdict`, and how many rows were `left_out`.

    Raises:
        UserError: if they share no row, or count other tokens in one.
    """
    import numpy as np

    _, at_a, at_b = np.intersect1d(first.keys, second.keys, return_indices=True)
    if not len(at_a):
        raise UserError(f"{names[0]} and {names[1]} share no plain text; rows are matched by `id`, or by text")
    tokens = [np.asarray(texts.tokens)[at] for texts, at in ((first, at_a), (second, at_b))]
    if len(other := np.flatnonzero(tokens[0] != tokens[1])):
        lines = first.lines[at_a[other[0]]], second.lines[at_b[other[0]]]
        raise UserError(
            f"{names[0]}:{lines[0]} and {names[1]}:{lines[1]} count other tokens of the same text; perplexity compares "
            "models with the same tokenizer only"
        )
    nll = [np.asarray(texts.nll)[at] for texts, at in ((first, at_a), (second, at_b))]
    before, after = ((n[:, None], t[:, None].astype(float)) for n, t in zip(nll, tokens, strict=True))
    ((difference, low, high),) = paired_bootstrap(before, after)
    return {
        "count": len(at_a),
        "before": math.exp(nll[0].sum() / tokens[0].sum()),
        "after": math.exp(nll[1].sum() / tokens[1].sum()),
        "ratio": math.exp(difference),
        "low": math.exp(low),
        "high": math.exp(high),
        "verdict": "cannot tell" if low <= 0 <= high else "better" if high < 0 else "worse",
        "left_out": len(first.lines) + len(second.lines) - 2 * len(at_a),
    }
