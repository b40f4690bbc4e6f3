"""What counts as a right answer."""

from typing import Any


def is_exact(actual: str, expected: str) -> bool:
    """Equal, white space around both aside: the encoder strips answers, so no model can write what was around them."""
    return actual.strip() == expected.strip()


def is_hit(row: dict[str, Any]) -> bool:
    """Whether a predicted row's answer is right. One with an `error` or without `actual` is not."""
    return "error" not in row and isinstance(row.get("actual"), str) and is_exact(row["actual"], row["expected"])
