"""Files whose content is not what their name says, and images under other spellings: read, or named with the fix."""

import base64
import bz2
import gzip
import io
import lzma
import unicodedata
import zipfile

import datasets
import pytest
from PIL import Image

from mistral_ft.data.pages import fingerprint, open_image
from mistral_ft.data.records import read_records
from mistral_ft.data.references import check_reference
from mistral_ft.data.rows import parse_line
from mistral_ft.data.tables import open_table
from mistral_ft.errors import UserError
from tests.conftest import make_page, write_jsonl

ROW = '{"messages": [{"role": "user", "content": "Qü"}, {"role": "assistant", "content": "A"}]}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
WEB_PAGE = b"\n<!DOCTYPE html>\n<html><body>404</body></html>"
BROKEN_OFF = "begins with nothing but NUL bytes: a download or copy that broke off; fetch it again"


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", ROW)
    return file.getvalue()


# name: (file, bytes, what is said of it)
FILES = {
    "UTF-16": ("a.jsonl", ROW.encode("utf-16"), "is UTF-16 text, not UTF-8: iconv -f UTF-16 -t UTF-8 a.jsonl > a-utf"),
    "UTF-16 without mark": ("a.jsonl", ROW.encode("utf-16-le"), "is UTF-16LE text, not UTF-8: iconv -f UTF-16LE"),
    "UTF-16, big end first": ("a.json", ROW.encode("utf-16-be"), "is UTF-16BE text, not UTF-8: iconv -f UTF-16BE"),
    "UTF-32": ("a.jsonl", ROW.encode("utf-32"), "is UTF-32 text, not UTF-8: iconv -f UTF-32 -t UTF-8"),
    "UTF-32 without mark": ("a.jsonl", ROW.encode("utf-32-le"), "is UTF-32LE text, not UTF-8: iconv -f UTF-32LE"),
    "UTF-16 in CSV": ("a.csv", "question,answer\nQ,A\n".encode("utf-16"), "is UTF-16 text, not UTF-8: iconv"),
    "gzip": ("a.jsonl.gz", gzip.compress(ROW.encode()), "is compressed: gunzip -c a.jsonl.gz > a.jsonl"),
    "gzip, named otherwise": ("a.jsonl", gzip.compress(b"x"), "is compressed: gunzip -c a.jsonl > a-unpacked.jsonl"),
    "gzip of a table": ("a.csv", gzip.compress(b"x"), "is compressed: gunzip -c a.csv > a-unpacked.csv"),
    "bzip2": ("a.jsonl.bz2", bz2.compress(b"x"), "is compressed: bunzip2 -c a.jsonl.bz2 > a.jsonl"),
    "xz": ("a.json.xz", lzma.compress(b"x"), "is compressed: unxz -c a.json.xz > a.json"),
    "zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00", "is compressed: zstd -dc a.jsonl.zst > a.jsonl"),
    "zip": ("a.zip", zipped(), "is a zip archive: unzip a.zip (if it is an Excel file, save it as CSV)"),
    "pointer": ("a.jsonl", POINTER, "is a git-LFS pointer, not the file itself: run git lfs pull"),
    "pointer of parquet": ("a.parquet", POINTER, "is a git-LFS pointer, not the file itself: run git lfs pull"),
    "pointer of CSV": ("a.csv", POINTER, "is a git-LFS pointer, not the file itself: run git lfs pull"),
    "web page": ("a.jsonl", WEB_PAGE, "is a web page, not the file itself: download that (on Hugging Face by "),
    "web page for parquet": ("a.parquet", WEB_PAGE, "is a web page, not the file itself: download that"),
    "zeros": ("a.jsonl", bytes(2000), BROKEN_OFF),
    "zeros for parquet": ("a.parquet", bytes(2000), BROKEN_OFF),
    "parquet": ("a.jsonl", b"PAR1\x15\x04", "is a parquet file: rename it to a.parquet"),
    "PDF": ("a.jsonl", b"%PDF-1.4\n", "is a PDF; rows of a JSONL file name its pages (file.pdf#page=3)"),
    "CSV of Windows": (
        "a.csv", "question,answer\nQü,A\n".encode("cp1252"),
        "not UTF-8 text; if Windows wrote it: iconv -f WINDOWS-1252 -t UTF-8 a.csv > a-utf8.csv",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    open_table.cache_clear()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_says_what_it_is(tmp_path, name, capfd):
    file, data, reason = FILES[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(UserError) as stop:
        read_records([file])
    assert str(stop.value).startswith(f"{file}: {reason}")
    assert "\n" not in str(stop.value)
    assert capfd.readouterr().err == ""


def test_lines_of_windows_and_zeros_at_the_end_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(ROW.encode() + ROW.encode("cp1252"))
    with pytest.raises(UserError, match="^a.jsonl:2: not UTF-8 text: .* if Windows wrote it: iconv -f WINDOWS-1252 -t"):
        read_records(["a.jsonl"])
    (tmp_path / "a.jsonl").write_bytes(ROW.encode() + bytes(50))
    with pytest.raises(UserError, match="^a.jsonl:2: not JSON: Expecting value at column 1; NUL bytes are what a"):
        read_records(["a.jsonl"])


def test_an_array_is_read_under_any_name(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"[{ROW},{ROW}]", encoding="utf-8")
    assert len(read_records(["a.jsonl"])) == 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image a.png cannot be opened: no PDF, and no image format that Pillow knows: it is empty, 0 bytes"),
        (POINTER, "image a.png is a git-LFS pointer, not the file itself: run git lfs pull"),
        (WEB_PAGE, "image a.png is a web page, not the file itself: download that"),
        (bytes(500), f"image a.png {BROKEN_OFF}"),
        (gzip.compress(b"x"), "image a.png is compressed: gunzip -c a.png > a-unpacked.png"),
        (b"text", "image a.png cannot be opened: no PDF, and no image format that Pillow knows"),
    ],
)
def test_what_is_no_image_says_what_it_is(tmp_path, data, reason):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=".") as stop:
        open_image("a.png")
    assert str(stop.value).startswith(reason)


def test_a_folder_is_no_image(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(
        ValueError, match="^image a.png cannot be opened: it is no file but a folder; name an image in it$"
    ):
        open_image("a.png")


@pytest.mark.parametrize("kind", ["JPEG", "PDF", "TIFF"])
def test_an_extension_that_lies_does_no_harm(tmp_path, kind):
    Image.new("RGB", (84, 56)).save(tmp_path / "a.png", kind)
    assert open_image("a.png").mode == "RGB"


ACCENT = "Gemäß.png"


@pytest.mark.parametrize(
    ("there", "written"),
    [
        (unicodedata.normalize("NFD", ACCENT), ACCENT),
        (ACCENT, unicodedata.normalize("NFD", ACCENT)),
        (f"{unicodedata.normalize('NFD', 'Zü')}/a.png", "Zü/a.png"),
        ("pages/a.png", "pages\\a.png"),
        ("pages/old/a.png", "pages\\old\\a.png"),
    ],
)
def test_a_page_is_found_by_another_spelling(tmp_path, there, written):
    (tmp_path / there).parent.mkdir(exist_ok=True, parents=True)
    make_page(tmp_path / there, 3)
    assert open_image(str(tmp_path / written)).size == (84, 56)
    assert fingerprint(str(tmp_path / written)) == fingerprint(str(tmp_path / there))


@pytest.mark.parametrize(
    ("there", "written"),
    [
        ("A.PNG", "a.png"),
        ("a.png", "a.png "),
        ("a b.png", "a%20b.png"),
        ("Pages/a.png", "pages/A.png"),
        ("pages/a.png", "PAGES\\a.png"),
    ],
)
def test_a_page_of_a_similar_name_is_named(tmp_path, there, written):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    make_page(tmp_path / there, 3)
    with pytest.raises(ValueError, match=".") as stop:
        open_image(str(tmp_path / written))
    assert str(stop.value) == f"image {tmp_path / written} does not exist; there is {tmp_path / there}"


def test_of_two_similar_names_none_is_guessed(tmp_path):
    for name in ("Ab.png", "AB.png"):
        make_page(tmp_path / name, 3)
    with pytest.raises(ValueError, match=r"ab.png does not exist$"):
        open_image("ab.png")


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (
            "a#page=1.png",
            "`image` must name pages as a.pdf#page=3 or a.pdf#page=1-4 do, not 'a#page=1.png'; a file of ",
        ),
        ("#page=2.pdf", "`image` must name pages as a.pdf#page=3 or a.pdf#page=1-4 do, not '#page=2.pdf'; a file of "),
    ],
)
def test_a_name_that_looks_like_a_page_must_be_changed(reference, reason):
    with pytest.raises(ValueError, match=".") as stop:
        check_reference(reference)
    assert str(stop.value) == f"{reason}such a name must be renamed"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff", "bmp"])
def test_base64_without_its_head_is_named(tmp_path, kind):
    file = io.BytesIO()
    Image.effect_noise((20, 20), 50).save(file, kind)
    row = {"question": "Q", "answer": "A", "image": base64.b64encode(file.getvalue()).decode()}
    with pytest.raises(UserError, match=f"is base64 without its head: write data:image/{kind};base64, before "):
        read_records([write_jsonl(tmp_path / "a.jsonl", [row])])


def test_a_key_that_stands_twice_is_a_warning(tmp_path, run_cli):
    twice = '{"messages": [{"role": "user", "content": "Q"}], "expected": "A", "expected": "B"}\n'
    (tmp_path / "a.jsonl").write_text(ROW + twice, encoding="utf-8")
    code, out, _ = run_cli("validate_data", "a.jsonl")
    assert code == 0
    assert out.splitlines()[0] == (
        "a.jsonl:2: warning: `expected` stands twice in an object, and only the last is read; remove one"
    )
    assert "  warning         1  keys that stand twice in an object" in out
    repeated: list[str] = []
    assert parse_line(b'{"a": [{"b": 1, "c": {"d": 1, "d": 2}}], "b": 2}', repeated=repeated)["a"][0]["c"] == {"d": 2}
    assert repeated == ["d"]
