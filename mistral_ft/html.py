"""What the pages of reports share: their frame, and how text and numbers are shown."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


def templates() -> "Environment":
    """What makes pages: every text is escaped, and a name that a template does not know is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # score needs none without --report

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": "{:,}".format,
        "visible": visible,
        "visible_lines": visible_lines,
        "lines": name_lines,
    }
    return environment


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent; what is not all (or nothing) is never rounded to it."""
    if share is None:
        return "–"
    text, least = f"{share:.{digits}%}", 10.0**-digits
    if share < 1 and text == f"{1:.{digits}%}":
        text = f"> {100 - least:.{digits}f}%"
    elif share > 0 and text == f"{0:.{digits}%}":
        text = f"< {least:.{digits}f}%"
    return text.replace("%", "\N{NO-BREAK SPACE}%")


def name_lines(lines: list[int], shown: int = 20) -> str:
    """Line numbers, not all of them if there are many."""
    more = ", …" if len(lines) > shown else ""
    return f"lines {', '.join(map(str, lines[:shown]))}{more}"


def visible(text: str, width: int = 60) -> str:
    """Text in one line, cut to `width` characters, with escapes for what a terminal or a page would not show."""
    text = text if len(text) <= width else f"{text[: width - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def visible_lines(text: str, width: int) -> str:
    """The same for text of several lines, which stay."""
    text = text if len(text) <= width else f"{text[: width - 1]}…"
    return "\n".join(visible(line, len(line)) for line in text.split("\n"))
