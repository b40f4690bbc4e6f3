"""Problems that repeat, folded: the first few of a kind of text in full, of the others how many and on which lines.

What is kept does not grow with the file: of a bounded number of texts, the first few problems, a count and some lines.
"""

import re
from dataclasses import dataclass, field

from mistral_ft.validation.checker import Kind, Place, Problem

SHOWN = 3  # of problems that are alike
MOST_TEXTS = 5  # that are told apart, of one kind in one file; what has yet another text counts as alike
MOST_SPANS = 10  # of lines that are named
# What may differ between texts that are alike: what stands in quotes, and words with a digit or a slash.
NAMES = re.compile(r"""(?<!\w)'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?<!\S)[^\s\d/\\]*[\d/\\]\S*""")


@dataclass
class Fold:
    """Problems that are alike: of one file and one kind, with texts that differ in names and numbers only.

    Attributes:
        like: what the others are, beside the first: "like it" or "of other texts".
        first: the first of them, at most `SHOWN`.
        more: how many others there are.
        spans: first and last one of lines that these are on; one more than `MOST_SPANS` if there are more.
    """

    like: str
    first: list[tuple[Place, Problem]] = field(default_factory=list)
    more: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, place: Place, problem: Problem) -> bool:
        """Count a problem; returns whether it is among the first."""
        if len(self.first) < SHOWN:
            self.first.append((place, problem))
            return True
        self.more += 1
        if self.spans and place.line - self.spans[-1][1] in (0, 1):
            self.spans[-1] = self.spans[-1][0], place.line
        elif len(self.spans) <= MOST_SPANS:
            self.spans.append((place.line, place.line))
        return False

    @property
    def rest(self) -> str:
        """How many others there are and where: "and 29 more like it: lines 12, 15-20, 33 …"; "" if there are none."""
        if not self.more:
            return ""
        lines = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in self.spans[:MOST_SPANS])
        dots = " …" if len(self.spans) > MOST_SPANS else ""
        return f"and {self.more:,} more {self.like}: line{'' if lines.isdigit() else 's'} {lines}{dots}"


class Folds:
    """All problems, folded.

    Attributes:
        of_kind: the folds of each kind, file after file.
    """

    def __init__(self) -> None:
        self.of_kind: dict[Kind, list[Fold]] = {}
        self._by_text: dict[tuple[Kind, str], dict[str, Fold]] = {}

    def add(self, place: Place, problem: Problem) -> bool:
        """Count a problem; returns whether it is among the first of those that are like it."""
        folds = self._by_text.setdefault((problem.kind, place.file), {})
        # Long texts are cut before names are looked for, and again where they are shown.
        text = NAMES.sub("…", problem.text.replace(f" {problem.name} ", " … ")[:500])
        if text not in folds and len(folds) >= MOST_TEXTS:
            text = ""
        if text not in folds:
            folds[text] = Fold("like it" if text else "of other texts")
            self.of_kind.setdefault(problem.kind, []).append(folds[text])
        return folds[text].add(place, problem)

    def rests(self) -> list[tuple[Place, Problem]]:
        """What stands for the problems that were not among the first: with the last one's place and text."""
        return [
            (place, problem._replace(text=f"{problem.text[:120]} … {fold.rest}"))
            for folds in self._by_text.values()
            for fold in folds.values()
            if fold.more
            for place, problem in fold.first[-1:]
        ]
