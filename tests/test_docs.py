"""The documents: a short README, every page one click away, links that lead somewhere, nothing said twice."""

import ast
import re
import string
from collections import defaultdict
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "mistral_ft"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MOST_BYTES = 12_000
LONG = 60  # characters of a sentence that may not stand in two pages


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    kept = string.ascii_lowercase + string.digits + " -_"
    return {"".join(c for c in heading.lower() if c in kept).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[tuple[Path, str]]:
    """The file and the anchor of every link that leads to no other site."""
    found = [link.partition("#") for link in LINK.findall(prose(page)) if "://" not in link]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in found]


def sentences(page: Path) -> list[str]:
    """Sentences, cells of tables and lines of code, spaces folded."""
    text = page.read_text(encoding="utf-8")
    code = [line.strip() for block in FENCED.findall(text) for line in block.splitlines()]
    paragraphs = re.split(r"\n\s*\n|\n(?=[-|#]|\d+\. )|\|", FENCED.sub("\n\n", text))
    found = [part for text in paragraphs for part in re.split(r"(?<=[.!?:;])\s+", " ".join(text.split()))]
    return [sentence.strip() for sentence in code + found]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= MOST_BYTES


def test_every_page_is_one_click_away():
    assert {path for path, _ in links(ROOT / "README.md")} >= set(PAGES) - {ROOT / "README.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        assert path.exists(), f"{path} does not exist"
        assert not anchor or anchor in anchors(path), f"{name_of(path)} has no heading for #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_are_there(page):
    folders = "mistral_ft|tests|docs|bench|configs|dataset|models|ui"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_no_sentence_stands_in_two_pages():
    where = defaultdict(set)
    for page in PAGES:
        for sentence in sentences(page):
            if len(sentence) >= LONG:
                where[sentence].add(name_of(page))
    assert {sentence: pages for sentence, pages in where.items() if len(pages) > 1} == {}


def test_the_architecture_names_every_file():
    """With what its docstring begins with."""
    rows = dict(re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", ARCHITECTURE, re.MULTILINE))
    files = [*ROOT.glob("*.py"), *(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")]
    expected = {}
    for path in files:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        in_room = path.is_relative_to(PACKAGE) and path.parent != PACKAGE
        expected[str(path.relative_to(PACKAGE if in_room else ROOT))] = " ".join(docstring.split("\n\n")[0].split())
    assert rows == expected


def defined(path: Path) -> set[str]:
    """What a module defines: names, and names of classes with those of their methods."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}.{method.name}" for method in methods}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


WALKS = sorted(set(re.findall(r"`((?:[a-z_]+\.)+\w+(?:\.\w+)?)`", ARCHITECTURE.partition("## Five walks")[2])))


@pytest.mark.parametrize("name", [name for name in WALKS if not name.endswith((".js", ".py"))])
def test_the_walks_name_what_there_is(name):
    parts = name.split(".")
    count = next(k for k in range(len(parts), 0, -1) if PACKAGE.joinpath(*parts[:k]).with_suffix(".py").is_file())
    module, rest = PACKAGE.joinpath(*parts[:count]).with_suffix(".py"), ".".join(parts[count:])
    assert rest in defined(module)
