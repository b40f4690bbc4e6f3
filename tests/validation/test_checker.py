"""validate_data names every fault of a data file by line, and nothing it reads makes it crash."""

import json
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mistral_ft.data.processor import Processor
from mistral_ft.validation.checker import RowChecker, Source, describe
from tests.conftest import TINY, make_page, row, write_jsonl

ASK = {"role": "user", "content": "a"}


def record(*messages, **fields) -> bytes:
    return json.dumps({"messages": list(messages) or [ASK], "expected": "b"} | fields).encode()


def blocks(*content) -> bytes:
    return record({"role": "user", "content": list(content)})


def shows(image) -> bytes:
    return blocks({"type": "image", "image": image})


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG file of grey pixels that says it has this size, whatever its data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# Asks for a password: the digest that the empty one should have is wrong.
LOCK = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'00' * 32}> /U <{'00' * 32}> >> /ID [<00> <00>]"


def make_pdf(pages: str, trailer: str = "") -> bytes:
    """A PDF of a catalogue and the given object."""
    parts = [b"%PDF-1.4\n", b"1 0 obj << /Type /Catalog /Pages 2 0 R >> endobj\n", f"2 0 obj {pages} endobj\n".encode()]
    starts = [len(b"".join(parts[:k])) for k in (1, 2)]
    table = "xref\n0 3\n0000000000 65535 f \n" + "".join(f"{start:010} 00000 n \n" for start in starts)
    end = f"trailer << /Size 3 /Root 1 0 R {trailer} >>\nstartxref\n{len(b''.join(parts))}\n%%EOF\n"
    return b"".join(parts) + (table + end).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, good and broken."""
    folder = tmp_path_factory.mktemp("data")
    make_page(folder / "good.png", 5)
    make_page(folder.parent / "outside.png", 6)
    whole = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:-40])
    (folder / "head.png").write_bytes(whole[:20])
    (folder / "checksum.png").write_bytes(whole.replace(b"IDAT", b"IDAT" + b"\0", 1))
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("This is no picture.")
    (folder / "bomb.png").write_bytes(png(20_000, 20_000))
    (folder / "nodata.png").write_bytes(png(100, 100))
    (folder / "dir.png").mkdir()
    (folder / "page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "page.pdf").write_bytes(b"%PDF-1.4\n")
    (folder / "empty.pdf").write_bytes(b"")
    (folder / "nopage.pdf").write_bytes(make_pdf("<< /Type /Pages /Kids [] /Count 0 >>"))
    (folder / "secret.pdf").write_bytes(make_pdf("<< /Type /Pages /Kids [] /Count 0 >>", LOCK))
    sheets = [Image.new("L", (80 + 10 * k, 60), 255) for k in range(3)]
    for name in ("three.tif", "three.pdf"):
        sheets[0].save(folder / name, save_all=True, append_images=sheets[1:])
    Image.new("L", (80, 80)).save(folder / "cut.jpg", quality=90)
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:300])
    Image.new("L", (80, 80)).save(folder / "cut.tif")
    (folder / "cut.tif").write_bytes((folder / "cut.tif").read_bytes()[:100])
    (folder / "odd.dds").write_bytes(b"DDS " + struct.pack("<I", 124) + b"\0" * 120)
    Image.new("L", (4000, 1)).save(folder / "thin.png")
    Image.new("L", (84, 20)).save(folder / "low.png")
    Image.new("1", (5000, 100)).save(folder / "wide.png")
    return folder


MESSAGE = "`messages` must be a list of at least one message, got "
CONTENT = "message 1: `content` must be a string or a list of blocks, got "
BLOCK = "message 1: block 1: "
TYPES = "; expected 'text', 'image' or 'thinking'"
PAGES = "`image` must name pages as a.pdf#page=3 or a.pdf#page=1-4 do, not "
CALLS = "message 2: `tool_calls` must look like "
SURROGATE = "holds half a surrogate pair (\\ud800 to \\udfff), which is no valid text"
NO_LINE = "not one JSON object per line: write each record on a line of its own, with no list around them"


def calls(tool_calls) -> bytes:
    return record(ASK, {"role": "assistant", "tool_calls": tool_calls})


# Fault: (line, message). {} in a message is the folder.
FAULTS = {
    # JSON
    "no JSON": (b"hello", "not JSON: Expecting value at column 1"),
    "single quotes": (b"{'a': 1}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    "bare word as key": (b"{a: 1}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    "Python's None": (b'{"a": None}', "not JSON: Expecting value at column 7"),
    "a comment": (b"// the training set", "a comment at column 1: JSON allows none, remove it"),
    "two objects on a line": (record() + record(), "not JSON: Extra data at column 66"),
    "lines ended by CR alone": (record() + b"\r" + record(), "not JSON: Extra data at column 67"),
    "no colon": (b'{"a" 1}', "not JSON: Expecting ':' delimiter at column 6"),
    "no comma": (b'{"a": 1 "b": 2}', "not JSON: Expecting ',' delimiter at column 9"),
    "unknown escape": (rb'{"a": "\x41"}', "not JSON: Invalid \\escape at column 8"),
    "short escape": (rb'{"a": "\u12"}', "not JSON: Invalid \\uXXXX escape at column 9"),
    "a tab in a string": (b'{"a": "x\ty"}', "not JSON: Invalid control character at column 9"),
    "trailing comma in an object": (b'{"a": 1,}', "trailing comma at column 8: JSON allows none, remove it"),
    "trailing comma in a list": (b'{"a": [1, ]}', "trailing comma at column 9: JSON allows none, remove it"),
    "cut off": (b'{"a": [1', "the line ends in the middle of the record (column 8): is the file cut off?"),
    "cut off in a string": (b'{"a": "x', "the line ends in the middle of the record (column 8): is the file cut off?"),
    "start of a list": (b"[", NO_LINE),
    "start of an object": (b"{", NO_LINE),
    "a list": (b"[1, 2]", "expected a JSON object, got a list"),
    "a number": (b"7", "expected a JSON object, got the number 7"),
    "a string": (b'"a"', "expected a JSON object, got a string"),
    "null": (b"null", "expected a JSON object, got nothing"),
    "true": (b"true", "expected a JSON object, got true/false"),
    "deep lists": (b'{"a": ' + b"[" * 100_000, "nested too deeply to be read"),
    "deep objects": (b'{"a": ' * 100_000, "nested too deeply to be read"),
    "endless number": (b'{"a": ' + b"1" * 5000 + b"}", "holds a number of more than 4300 digits"),
    # Encodings
    "NUL bytes alone": (b"\0" * 10, "not JSON: Expecting value at column 1"),
    "NUL byte in a string": (b'{"a": "x\0y"}', "not JSON: Invalid control character at column 9"),
    "byte order mark amid the file": (b"\xef\xbb\xbf{}", "not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig)"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8 text: invalid continuation byte at byte 8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8 text but UTF-16; save the file as UTF-8"),
    "cut off in a letter": ('{"a": "é'.encode()[:-1], "not UTF-8 text: invalid continuation byte at byte 8"),
    "surrogate in bytes": (b'{"a": "\xed\xa0\x80"}', "not UTF-8 text: invalid continuation byte at byte 8"),
    "overlong": (b'{"a": "\xc0\x80"}', "not UTF-8 text: invalid start byte at byte 8"),
    "high surrogate": (rb'{"a": "\ud83d"}', SURROGATE),
    "low surrogate": (rb'{"a": "\uDE00"}', SURROGATE),
    "surrogates in the wrong order": (rb'{"a": "\ude00\ud83d"}', SURROGATE),
    "surrogate in a key": (rb'{"\ud800": 1}', SURROGATE),
    "surrogate in the answer": (rb'{"messages": [{"role": "user", "content": "a"}], "expected": "\udfff"}', SURROGATE),
    # Schema
    "no right answer": (
        record(expected=[]),
        "`expected` is an empty list; name at least one right answer in it, or leave it out",
    ),
    "null among right answers": (
        record(expected=[None]),
        "answer 1 in `expected` must be a string, got nothing; put JSON answers in quotes",
    ),
    "empty object": (b"{}", "no `messages`; expected a list of messages with `role` and `content`"),
    "messages null": (record(messages=None), "no `messages`; expected a list of messages with `role` and `content`"),
    "messages a string": (record(messages="Hi"), MESSAGE + "a string"),
    "messages an object": (record(messages=ASK), MESSAGE + "an object"),
    "messages empty": (record(messages=[]), MESSAGE + "an empty list"),
    "message null": (record(None), "message 1: expected an object with `role` and `content`, got nothing"),
    "message a string": (record("Hi"), "message 1: expected an object with `role` and `content`, got a string"),
    "content missing": (record({"role": "user"}), CONTENT + "nothing"),
    "content a number": (record({"role": "user", "content": 5}), CONTENT + "the number 5"),
    "content an object": (record({"role": "user", "content": {}}), CONTENT + "an object"),
    "block a string": (blocks("Hi"), BLOCK + "expected an object with `type`, got a string"),
    "block without a type": (blocks({"text": "a"}), f"{BLOCK}unknown type None{TYPES}"),
    "OpenAI's image": (blocks({"type": "image_url"}), f"{BLOCK}unknown type 'image_url'{TYPES}"),
    "type a list": (blocks({"type": []}), f"{BLOCK}unknown type []{TYPES}"),
    "text missing": (blocks({"type": "text"}), BLOCK + "`text` must be a string, got nothing"),
    "text a number": (blocks({"type": "text", "text": 3}), BLOCK + "`text` must be a string, got the number 3"),
    "image missing": (blocks({"type": "image"}), BLOCK + "`image` must be the path of an image file, got nothing"),
    "image empty": (shows(""), BLOCK + "`image` must be the path of an image file, got an empty string"),
    "image a list": (shows(["a.png"]), BLOCK + "`image` must be the path of an image file, got a list"),
    "image a URL": (
        shows("https://a.example/b.png"),
        BLOCK + "`image` is on the web: download it (wget https://a.example/b.png) and write the file's path",
    ),
    "image a file URL": (
        shows("file:///a%20b.png"),
        BLOCK + "`image` is a file: URL: write the path itself, /a b.png (reformat_data does so)",
    ),
    "data URL without base64": (
        shows("data:image/png,abc"),
        BLOCK + "`image` is no base64 data URL (data:image/png;base64,…): data:image/png,abc",
    ),
    "data URL cut off": (
        shows("data:image/png;base64,AAAAA"),
        "image data:image/png;base64,AAAAA cannot be opened: it is no valid base64: is it cut off?",
    ),
    "data URL of no image": (
        shows("data:image/png;base64,AAAA"),
        "image data:image/png;base64,AAAA cannot be opened: no PDF, and no image format that Pillow knows",
    ),
    "page 0": (shows("a.pdf#page=0"), BLOCK + PAGES + "'a.pdf#page=0'"),
    "page without a number": (shows("a.pdf#page="), BLOCK + PAGES + "'a.pdf#page='"),
    "page by name": (shows("a.pdf#page=ii"), BLOCK + PAGES + "'a.pdf#page=ii'"),
    "pages from last to first": (shows("a.pdf#page=4-1"), BLOCK + PAGES + "'a.pdf#page=4-1'"),
    "page of nothing": (shows("#page=1"), BLOCK + PAGES + "'#page=1'"),
    "too many pages": (
        shows("a.pdf#page=1-5000"),
        BLOCK + "`image` asks for 5,000 pages; at most 1,000 make one record",
    ),
    "expected missing": (record(expected=None), "no `expected`: the answer to learn and to score against"),
    "expected a number": (
        record(expected=12),
        "`expected` must be a string, got the number 12; put JSON answers in quotes",
    ),
    "expected an object": (
        record(expected={"a": 1}),
        "`expected` must be a string, got an object; put JSON answers in quotes",
    ),
    "tools a string": (record(tools="x"), "`tools` is text that is no JSON"),
    "tools of strings": (record(tools=["x"]), "`tools` must be a list of objects, got a list"),
    # Roles and order
    "unknown role": (
        record({"role": "human", "content": "a"}),
        "message 1: unknown role 'human'; expected one of system, user, assistant, tool",
    ),
    "role missing": (
        record({"content": "a"}),
        "message 1: unknown role None; expected one of system, user, assistant, tool",
    ),
    "role an object": (
        record({"role": {}, "content": "a"}),
        "message 1: unknown role {}; expected one of system, user, assistant, tool",
    ),
    "system alone": (
        record({"role": "system", "content": "a"}),
        "no message has role 'user'",
    ),
    "answer twice": (
        record(ASK, {"role": "assistant", "content": "b"}),
        "the answer is there twice, as the last message and in `expected`; leave out one of them",
    ),
    "assistant says nothing": (
        record(ASK, {"role": "assistant", "content": ""}, ASK),
        "message 2: an assistant message says nothing: it needs `content` or `tool_calls`",
    ),
    "system after the assistant": (
        record(ASK, {"role": "assistant", "content": "b"}, {"role": "system", "content": "c"}, ASK),
        "message 3: a system message cannot follow a message of role 'assistant'",
    ),
    "tool first": (
        record({"role": "tool", "content": "a"}, ASK),
        "message 1: a tool message must follow the assistant's tool call",
    ),
    "tool after the user": (
        record(ASK, {"role": "tool", "content": "a"}),
        "message 2: a tool message must follow the assistant's tool call",
    ),
    "nobody asks": (
        record({"role": "assistant", "content": "a"}, {"role": "tool", "content": "a"}),
        "no message has role 'user'",
    ),
    "image of the assistant": (
        record(ASK, {"role": "assistant", "content": [{"type": "image", "image": "good.png"}]}, ASK),
        "message 2: block 1: an image belongs in a user message, not in one of role 'assistant'",
    ),
    # Tool calls
    "calls a string": (calls("f"), CALLS),
    "call without a function": (calls([{"id": "1"}]), CALLS),
    "function without a name": (calls([{"function": {"arguments": {}}}]), CALLS),
    "arguments no JSON": (
        calls([{"function": {"name": "f", "arguments": "{"}}]),
        "message 2: `arguments` of f are no JSON",
    ),
    "arguments deep": (
        calls([{"function": {"name": "f", "arguments": "[" * 100_000}}]),
        "message 2: `arguments` of f are no JSON",
    ),
    "arguments a list": (
        calls([{"function": {"name": "f", "arguments": []}}]),
        "message 2: `arguments` of f must be a JSON object, got an empty list",
    ),
    "calls of the user": (
        record(ASK | {"tool_calls": []}),
        "message 1: `tool_calls` belong in an assistant message, not in one of role 'user'",
    ),
    "call id a number": (
        record(ASK, {"role": "assistant", "content": "b"}, {"role": "tool", "content": "c", "tool_call_id": 5}),
        "message 3: `tool_call_id` must be a string, got the number 5",
    ),
    # Images
    "image not there": (shows("none.png"), "image {}/none.png does not exist"),
    "image a folder": (shows("dir.png"), "image {}/dir.png cannot be opened: it is no file"),
    "image empty file": (
        shows("empty.png"),
        "image {}/empty.png cannot be opened: no PDF, and no image format that Pillow knows",
    ),
    "image a text": (
        shows("text.png"),
        "image {}/text.png cannot be opened: no PDF, and no image format that Pillow knows",
    ),
    "image SVG": (
        shows("page.svg"),
        "image {}/page.svg cannot be opened: no PDF, and no image format that Pillow knows",
    ),
    "PDF that ends after its head": (
        shows("page.pdf"),
        "image {}/page.pdf cannot be opened: the PDF is damaged, or has no page",
    ),
    "PDF without a page": (
        shows("nopage.pdf"),
        "image {}/nopage.pdf cannot be opened: the PDF is damaged, or has no page",
    ),
    "PDF with a password": (
        shows("secret.pdf#page=1"),
        "image {}/secret.pdf#page=1 cannot be opened: the PDF is protected by a password; save a copy without",
    ),
    "empty PDF": (shows("empty.pdf"), "image {}/empty.pdf cannot be opened: no PDF, and no image format"),
    "PDF not there": (shows("none.pdf#page=2"), "image {}/none.pdf#page=2 does not exist"),
    "PDF of which page?": (
        shows("three.pdf"),
        "image {}/three.pdf cannot be opened: it has 3 pages: add #page=1 to the path for one, or #page=1-3 for all",
    ),
    "no such page of a PDF": (
        shows("three.pdf#page=4"),
        "image {}/three.pdf#page=4 cannot be opened: it has no page 4, the last is 3",
    ),
    "pages beyond the end of a PDF": (
        shows("three.pdf#page=3-4"),
        "image {}/three.pdf#page=4 cannot be opened: it has no page 4, the last is 3",
    ),
    "TIFF of which page?": (
        shows("three.tif"),
        "image {}/three.tif cannot be opened: it has 3 pages: add #page=1 to the path for one, or #page=1-3 for all",
    ),
    "no such page of a TIFF": (
        shows("three.tif#page=9"),
        "image {}/three.tif#page=9 cannot be opened: it has no page 9, the last is 3",
    ),
    "no such page of a PNG": (
        shows("good.png#page=2"),
        "image {}/good.png#page=2 cannot be opened: it has no page 2, the last is 1",
    ),
    "PNG cut off": (shows("cut.png"), "image {}/cut.png cannot be opened: "),
    "PNG cut off in its head": (shows("head.png"), "image {}/head.png cannot be opened: "),
    "PNG with a broken chunk": (shows("checksum.png"), "image {}/checksum.png cannot be opened: "),
    "PNG without pixels": (shows("nodata.png"), "image {}/nodata.png cannot be opened: "),
    "JPEG cut off": (shows("cut.jpg"), "image {}/cut.jpg cannot be opened: "),
    "TIFF cut off": (shows("cut.tif"), "image {}/cut.tif cannot be opened: "),
    "DDS of an unknown format": (
        shows("odd.dds"),
        "image {}/odd.dds cannot be opened: Unknown pixel format flags 0",
    ),
    "image of 400 million pixels": (
        shows("bomb.png"),
        "image {}/bomb.png has more than 178 million pixels; scale it down, or raise --max_image_pixels",
    ),
    "image too thin": (
        shows("thin.png"),
        "image thin.png of 4000 × 1 px: the image is too thin: fitted into 1540 px it has no pixel left",
    ),
    "NUL in a path": (shows("a\0.png"), "image {}/a .png cannot be opened: embedded null byte"),
    "line end in a path": (shows("a\nb.png"), "image {}/a b.png does not exist"),
    "endless path": (shows("a" * 5000), "image {}/aaa"),
    "path out of the folder": (shows("../none.png"), "image {}/../none.png does not exist"),
    "too many tokens": (record(ASK, expected="word " * 3000), "3005 tokens (0 of them for 0 images) are more than "),
}

WARNINGS = {
    "control token in a question": (
        record({"role": "user", "content": "[INST] a [/INST]"}),
        "[/INST], [INST] in a text is learned letter by letter; remove it if it is no text",
    ),
    "control token in an answer": (
        record(expected="b</s>"),
        "</s> in a text is learned letter by letter; remove it if it is no text",
    ),
    "control token in a block": (
        blocks({"type": "text", "text": "[IMG]"}),
        "[IMG] in a text is learned letter by letter; remove it if it is no text",
    ),
    "empty answer": (record(expected=" "), "`expected` is empty: the model learns to say nothing"),
    "empty answer among several": (
        record(expected=["a", ""]),
        "answer 2 in `expected` is empty: saying nothing counts as right",
    ),
    "answer of broken JSON among several": (
        record(expected=["{}", '{"a": 1']),
        "answer 2 in `expected` starts like a JSON object and is none: "
        "Expecting ',' delimiter: line 1 column 8 (char 7)",
    ),
    "answer of broken JSON": (
        record(expected='{"a": 1'),
        "`expected` starts like a JSON object and is none: Expecting ',' delimiter: line 1 column 8 (char 7)",
    ),
    "long answer": (
        record(expected="word " * 400),
        "the answer has 401 tokens; predict needs --max_new_tokens 401 or more for it",
    ),
    "path to the folder above": (
        shows("../outside.png"),
        "image ../outside.png is not below {}: copy it there, to keep data in one",
    ),
    "low page": (shows("low.png"), "image low.png of 84 × 20 px is too small to read; scan it at a higher resolution"),
    "wide page": (shows("wide.png"), "image wide.png of 5000 × 100 px is shrunk 3.2 times; cut it into parts"),
}


@pytest.fixture(scope="module")
def checker():
    return RowChecker(Processor.from_folder(TINY), 2048)


def problems(checker, folder, line: bytes, number: int = 2, is_eval: bool = False) -> list[str]:
    """What a line of data.jsonl is said to have, fatal first."""
    checked = checker.check(line, number, Source(folder / "data.jsonl", folder, is_eval))
    return [] if checked is None else [describe("data.jsonl:2", p) for p in checked.problems]


def test_there_are_enough_faults():
    assert len({line for line, _ in FAULTS.values()}) == len(FAULTS) >= 60


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_fatal_and_named(checker, folder, fault):
    line, message = FAULTS[fault]
    found = [text for text in problems(checker, folder, line + b"\n") if "warning" not in text]
    assert len(found) == 1
    assert found[0].startswith(
        f"data.jsonl:2: {message.replace('{}', str(folder), 1) if '{}/' in message else message}"
    )
    assert found[0].isprintable()
    assert len(found[0]) <= 500


@pytest.mark.parametrize("fault", WARNINGS)
def test_a_doubt_is_a_warning(checker, folder, fault):
    line, message = WARNINGS[fault]
    assert problems(checker, folder, line) == [f"data.jsonl:2: warning: {message.replace('{}', str(folder))}"]


@pytest.mark.parametrize(
    ("line", "number"),
    [
        (record(), 2), (record() + b"\r\n", 2), (b"\xef\xbb\xbf" + record(), 1), (b" \t\r\n", 2), (b"", 2),
        (record(id=[1, {}]), 2), (shows("good.png"), 2), (record(expected="😀 é ﬁ \u2028"), 2),
        (record(expected=["a", "b", "a"]), 2), (record(expected=['{"a": 1}', "[INST]"]), 2),
    ],
)  # fmt: skip
def test_what_is_good_is_left_alone(checker, folder, line, number):
    assert problems(checker, folder, line, number) == []


def test_rows_to_predict_need_no_answer(checker, folder):
    assert problems(checker, folder, record(expected=None), is_eval=True) == []


def test_every_image_of_a_row_is_named(checker, folder):
    found = problems(checker, folder, blocks(*({"type": "image", "image": i} for i in ("x.png", "good.png", "y.png"))))
    assert found == [f"data.jsonl:2: image {folder}/{name}.png does not exist" for name in "xy"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=4),
    max_leaves=8,
)
WORDS = st.sampled_from(["user", "assistant", "system", "tool", "text", "image", "good.png", "{}", "</s>", ""]) | JSON
PIECE = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("role", "type", "text", "image", "name", "arguments", "tool_call_id", "weight"), WORDS)
)
MESSAGE_LIKE = st.fixed_dictionaries(
    {"role": WORDS},
    optional={
        "content": st.lists(PIECE | JSON, max_size=3) | WORDS,
        "tool_calls": st.lists(PIECE | JSON) | JSON,
        "weight": JSON,
    },
)
RECORD_LIKE = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE_LIKE | JSON, max_size=4) | JSON},
    optional={"id": JSON, "expected": WORDS, "tools": st.lists(PIECE) | JSON, "images": JSON},
)
OTHER_LIKE = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("prompt", "completion"), st.lists(MESSAGE_LIKE) | WORDS)
    | {"text": st.sampled_from(["a", "<s>[INST] a [/INST] b</s>", "[INST]"]) | WORDS, "image": WORDS, "system": WORDS},
)


@settings(max_examples=300, deadline=None)
@given(JSON | RECORD_LIKE | OTHER_LIKE)
def test_any_json_gets_a_line_or_is_good(checker, folder, data):
    for text in problems(checker, folder, json.dumps(data).encode()):
        assert text.startswith("data.jsonl:2: ")
        assert text.isprintable()


@settings(max_examples=300, deadline=None)
@given(st.binary())
def test_any_bytes_get_a_line_or_are_good(checker, folder, line):
    for text in problems(checker, folder, line):
        assert text.startswith("data.jsonl:2: ")
        assert text.isprintable()


@pytest.mark.filterwarnings("ignore")  # Pillow's about the damage
@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=8))
def test_any_damage_to_an_image_gets_a_line_or_none(folder, place, damage):
    data = (folder / "good.png").read_bytes()
    place %= len(data)
    (folder / "damaged.png").write_bytes(data[:place] + damage + data[place + len(damage) :])
    for text in problems(RowChecker(), folder, shows("damaged.png")):
        assert text.startswith("data.jsonl:2: ")


# The whole step.


def test_good_data_end_in_a_summary(run_cli, pages):
    place = pages / "train.jsonl"
    code, out, _ = run_cli("validate_data", place, "--model_id", TINY, "--show", 1)
    assert code == 0
    assert out == (
        f"{place}:1: <s>[INST][IMG]×12Title?[/INST]⟦De⟧⟦cre⟧⟦e⟧⟦ ⟧⟦2⟧⟦0⟧⟦ on⟧⟦ S⟧⟦alt⟧⟦</s>⟧\n"
        "8 rows, 8 images\n"
        "tokens        min   median     95 %      max\n"
        "prompt          6        6       13       13\n"
        "images          0        8       16       16\n"
        "answer          3       10       10       10\n"
        f"The longest rows: {place}:8 (31), {place}:1 (28), {place}:4 (28), {place}:6 (27), {place}:2 (24)\n"
        "The smallest page: 84 × 56 px, fed as 84 × 56\n"
        "The median page: 84 × 56 px, fed as 84 × 56\n"
        "The largest page: 56 × 112 px, fed as 56 × 112\n"
        "0 fatal problems in 0 of 8 rows, 0 warnings\n"
    )


def test_all_faults_of_all_files_are_named(run_cli, folder, tmp_path):
    lines = [*(line for line, _ in FAULTS.values()), record()]
    (folder / "bad.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(line.replace(b"\r", b"") for line in lines))
    (folder / "none.jsonl").write_bytes(b"\n\n")
    code, out, err = run_cli(
        "validate_data", folder / "bad.jsonl", folder / "none.jsonl", "--model_id", TINY, "--max_seq_length", 2048,
        "--write_clean", folder / "clean.jsonl", "--all",
    )  # fmt: skip
    assert code == 1
    assert "Traceback" not in out + err
    fatal = [text for text in out.splitlines() if text.startswith(f"{folder}/") and ": warning: " not in text]
    assert [text.split(": ")[0] for text in fatal] == [
        *(f"{folder}/bad.jsonl:{number}" for number in range(1, len(FAULTS) + 1)),
        f"{folder}/none.jsonl",
    ]
    assert fatal[-1] == f"{folder}/none.jsonl: holds no record; expected one JSON object per line"
    assert f"{len(FAULTS) + 1} fatal problems in {len(FAULTS)} of {len(FAULTS) + 1} rows, " in out
    assert (folder / "clean.jsonl").read_bytes() == record() + b"\n"


def test_what_is_wrong_between_rows_is_named(run_cli, tmp_path):
    for number in range(4):
        make_page(tmp_path / f"{number}.png", number)
    make_page(tmp_path / "copy.png", 0)
    train = write_jsonl(
        tmp_path / "train.jsonl",
        [row(0, "A", ["0.png"]), row(1, '{"a": 1}', ["1.png"]), row(2, "A", ["0.png"]), row(1, "C", ["1.png"]),
         row(3, "D", text="What?")],
    )  # fmt: skip
    test = write_jsonl(
        tmp_path / "test.jsonl",
        [row(0, "B", ["2.png"]), row(1, "B", ["copy.png"]), row(2, "D", text="What?"), row(3, "B", ["3.png", "1.png"])],
    )
    code, out, _ = run_cli("validate_data", train, "--eval", test)
    assert code == 0
    assert out.splitlines() == [
        f"{train}:3: warning: the same record as {train}:1; remove one",
        f"{train}:4: warning: the id of line 2 again; ids must differ",
        f"{test}:2: warning: a page of it is in training too, at {train}:1; remove one",
        f"{test}:3: warning: its record is in training too, at {train}:5; remove one",
        f"{test}:4: warning: a page of it is in training too, at {train}:2; remove one",
        f"{train}:2: warning: 1 answers are JSON objects, 8 are not; this is the first of the fewer",
        "9 rows, 8 images",
        "0 fatal problems in 0 of 9 rows, 6 warnings",
        "  warning         3  rows of --eval that training has seen",
        "  warning         1  duplicate records",
        "  warning         1  ids used twice",
        "  warning         1  answers of mixed formats",
    ]


def test_the_clean_file_trains_and_says_where_its_images_are(run_cli, pages, tmp_path):
    train = pages / "train.jsonl"
    (pages / "3.png").write_bytes(b"")
    lines = train.read_bytes().splitlines(keepends=True)
    train.write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    clean = tmp_path / "clean.jsonl"
    code, out, _ = run_cli("validate_data", train, "--write_clean", clean)
    assert code == 1
    assert out.endswith(f"7 rows in {clean}\nUse it with --images_dir {pages}\n")
    assert clean.read_bytes() == b"".join(lines[:3] + lines[4:])
    assert run_cli("validate_data", clean, "--images_dir", pages)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no FILE to check (see python -m validate_data --help)"),
        (["none.jsonl"], "none.jsonl: no such file"),
        (["data.jsonl", "--eval", "data.jsonl"], "two of the files are the same one"),
        (["data.jsonl", "--max_seq_length", "5"], "--max_seq_length and --show have no effect without --model_id"),
        (["data.jsonl", "--show", "5"], "--max_seq_length and --show have no effect without --model_id"),
        (["data.jsonl", "--model_id", TINY, "--show", "-1"], "--show -1: must not be negative"),
        (["data.jsonl", "--model_id", TINY, "--max_seq_length", "0"], "--max_seq_length 0: must be at least 1"),
        (["data.jsonl", "--write_clean", "link.jsonl"], "--write_clean link.jsonl: is one of the files to check"),
        (["data.jsonl", "--report", "link.jsonl"], "--report link.jsonl: is one of the files to check"),
        (["data.jsonl", "--report", "a", "--write_clean", "a"], "--report and --write_clean are the same file"),
        (["data.jsonl", "--write_clean", "nowhere/a.jsonl"], "nowhere: no such folder to write a.jsonl into"),
        (["--eval", "data.jsonl", "--write_clean", "a.jsonl"], "--write_clean has no effect without a FILE"),
        (["data.jsonl", "sub/data.jsonl", "--write_clean", "a.jsonl"], "--write_clean of files in several folders"),
        (["data.jsonl", "--images_dir", "nowhere"], "nowhere: no such folder of images; give it with --images_dir"),
        (["data.jsonl", "--model_id", "nowhere"], "nowhere: no such folder, and no hub id such as"),
    ],
)
def test_a_wrong_command_is_named(run_cli, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("data.jsonl", "sub/data.jsonl"):
        (tmp_path / name).write_bytes(record())
    (tmp_path / "link.jsonl").symlink_to("data.jsonl")
    code, out, err = run_cli("validate_data", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}")
    assert len(err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "link.jsonl", "sub"]
    assert (tmp_path / "data.jsonl").read_bytes() == record()


# The report.


def test_the_report_shows_what_is_wrong_and_what_is_there(run_cli, folder, tmp_path):
    lines = [*(shows(f"none-{number}.png") for number in range(12)), shows("low.png"), shows("good.png")]
    lines.append(record({"role": "user", "content": "<script>alert(1)</script></s>"}, expected="<b>bold</b>", id="<i>"))
    path = folder / "<u>.jsonl"
    path.write_bytes(b"\n".join(lines))
    page = tmp_path / "report.html"
    code, out, _ = run_cli("validate_data", path, "--model_id", TINY, "--report", page)
    assert code == 1
    assert out.endswith(f"Report in {page}\n")
    html = page.read_text()
    assert "Train would refuse 12 of 15 rows" in html
    assert "12 fatal problems, 2 warnings, 2 images." in html
    wrong, there = html.split('<section id="summary">')
    assert wrong.count("none-") == 3
    assert "… and 9 more like it: lines 4-12" in wrong
    assert "is too small to read" in html
    assert wrong.count("<img ") == wrong.count('src="data:image/jpeg;base64,') == 1
    assert there.count("<img ") == there.count('src="data:image/jpeg;base64,') == 2
    assert "&lt;u&gt;.jsonl:13" in html
    assert not any(tag in html for tag in ("<script", "<u>", "<b>b", "<i>", "http-equiv=refresh", 'src="http'))


def test_a_report_on_good_data_and_without_a_model(run_cli, pages, tmp_path):
    page = tmp_path / "report.html"
    assert run_cli("validate_data", pages / "train.jsonl", "--report", page)[0] == 0
    assert "Train takes all 8 rows" in page.read_text()


def test_thumbnails_are_those_of_the_pages_that_are_meant_and_not_too_many(run_cli, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mistral_ft.validation.report.MOST_THUMBNAILS", 3)
    lines = [
        blocks(
            {"type": "image", "image": "good.png"}, {"type": "image", "image": "low.png"}, {"type": "text", "text": t}
        )
        for t in "abcde"
    ]
    (folder / "low.jsonl").write_bytes(b"\n".join(lines))
    page = tmp_path / "report.html"
    assert run_cli("validate_data", folder / "low.jsonl", "--report", page)[0] == 0
    wrong, _ = page.read_text().split('<section id="summary">')
    assert wrong.count("<figcaption>low.png</figcaption>") == wrong.count("<img ") == 3


def test_what_the_24b_takes_is_said(run_cli, pages, tmp_path):
    for path in TINY.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 32768}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = tmp_path / "report.html"
    code, out, _ = run_cli("validate_data", pages / "train.jsonl", "--model_id", tmp_path, "--report", page)
    assert code == 0
    assert "  all records fit: the longest has 31 tokens, and about 34,000 have room\n" in out
    assert "all records fit: the longest has 31 tokens" in page.read_text()


def test_an_answer_that_the_tokenizer_changes_is_a_warning(folder, tmp_path):
    for path in TINY.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "NFKC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = problems(RowChecker(Processor.from_folder(tmp_path), 2048), folder, record(expected="10 m² ﬁn"))
    assert found == [
        "data.jsonl:2: warning: the answer comes back from the tokenizer as '2 fin' at character 5, not as '² ﬁn'"
    ]


def test_an_adapter_counts_tokens_as_its_run_does(run_cli, pages, train_tiny):
    run = train_tiny(pages / "train.jsonl", "--max_steps", 1, "--save_steps", 1)
    _, base, _ = run_cli("validate_data", pages / "train.jsonl", "--model_id", TINY)
    assert "prompt" in base
    for folder in (run, run / "checkpoint-1"):
        code, out, err = run_cli("validate_data", pages / "train.jsonl", "--model_id", folder)
        assert (code, out) == (0, base), err
