"""PDFs: what is drawn, what is refused and why, and that one PDF does not cost another its page."""

import os
import select
import signal
import subprocess
import sys
import threading

import pytest
from PIL import Image

from bench import hostile_pdfs
from bench.hostile_pdfs import file_of, form_of, pdf_of, stream_of
from mistral_ft.data.pages import open_image, page_size
from mistral_ft.data.picture import pdf
from tests.conftest import ROOT, TINY, read_rows, row, write_jsonl

FONT = "/Font<</Helv 5 0 R>>"
HELVETICA = "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
FIELD = "<</Type/Annot/Subtype/Widget/FT/Tx/T(a)/V(WWWW)/Rect[50 50 250 80]/F 4/DA(/Helv 12 Tf 0 g)/P 3 0 R"
INK = form_of(b"0 0 200 30 re f", "", "/BBox[0 0 200 30]")
TOO_LONG = "drawing it takes more than 0.3 s: save the page as an image, or raise --pdf_seconds"
NO_PICTURE = "its pictures are damaged or too large to be drawn: save the page as an image"
TOO_LARGE = "drawing it takes more than 0.125 GiB of memory: save the page as an image"


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Limits that are soon reached, and no process that has drawn anything."""
    monkeypatch.setenv(pdf.SECONDS, "0.3")
    monkeypatch.setattr(pdf, "MEMORY", 1 << 27)
    monkeypatch.setattr(pdf, "_readers", pdf._Readers())


@pytest.fixture
def save(tmp_path):
    """save(bytes) -> the path of a PDF."""

    def write(data: bytes, name: str = "a.pdf") -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


def reason(path: str) -> str:
    """Why a page cannot be opened."""
    with pytest.raises(ValueError, match="cannot be opened") as found:
        open_image(path)
    start, _, why = str(found.value).partition(" cannot be opened: ")
    assert start == f"image {path}"
    return why


def marked(path: str) -> bool:
    """Whether anything dark is drawn between 50, 50 and 250, 80 points."""
    scale = pdf.DPI / 72
    box = (round(50 * scale), round(320 * scale), round(250 * scale), round(350 * scale))
    return open_image(path).convert("L").crop(box).getextrema()[0] < 128


class TestDrawn:
    @pytest.mark.parametrize("before", [b"", b"\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"\0" * 1000])
    def test_bytes_before_the_header(self, save, before):
        path = save(before + hostile_pdfs.good(0))
        assert open_image(path).size == page_size(path) == (834, 1112)
        assert open_image(path).getextrema() != ((255, 255),) * 3

    def test_a_header_that_comes_too_late(self, save):
        assert reason(save(b"\n" * 1024 + hostile_pdfs.good(0))) == "no PDF, and no image format that Pillow knows"

    def test_a_picture_that_mentions_pdfs_is_a_picture(self, tmp_path):
        Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", comment="made from %PDF-1.7")
        assert b"%PDF-" in (tmp_path / "a.jpg").read_bytes()[:1024]
        assert page_size(tmp_path / "a.jpg") == open_image(tmp_path / "a.jpg").size == (40, 30)

    @pytest.mark.parametrize(
        ("field", "catalog"),
        [
            (f"{FIELD}>>", "/AcroForm<</Fields[6 0 R]/DR<</Font<</Helv 5 0 R>>>>>>"),  # PDFium makes its appearance
            (f"{FIELD}/AP<</N 7 0 R>>>>", "/AcroForm<</Fields[6 0 R]>>"),
            (f"{FIELD}/AP<</N 7 0 R>>>>", "/AcroForm<</Fields[]>>"),
            (f"{FIELD}/AP<</N 7 0 R>>>>", ""),
            (f"{FIELD.replace('/FT/Tx', '/FT/Btn')}/AS/On/AP<</N<</On 7 0 R>>>>>>", "/AcroForm<</Fields[6 0 R]>>"),
            (f"{FIELD.replace('/FT/Tx', '/FT/Btn')}/AS/On/AP<</N<</On 7 0 R>>>>>>", ""),
        ],
        ids=["text", "appearance", "field of no form", "no form", "box", "box of no form"],
    )
    def test_what_was_filled_in(self, save, field, catalog):
        assert marked(save(pdf_of(b"", FONT, HELVETICA, field, INK, page="/Annots[6 0 R]", catalog=catalog)))

    @pytest.mark.parametrize(
        ("kind", "is_drawn"),
        [
            ("/Subtype/Highlight/QuadPoints[50 80 250 80 50 50 250 50]/C[0 0 0]", True),
            ("/Subtype/Ink/InkList[[50 50 250 80]]/C[0 0 0]", True),
            ("/Subtype/FreeText/Contents(WWWW)/DA(/Helv 12 Tf 0 g)", True),
            ("/Subtype/Stamp/AP<</N 7 0 R>>", True),
            ("/Subtype/Stamp/F 2/AP<</N 7 0 R>>", False),  # hidden
        ],
    )
    def test_annotations(self, save, kind, is_drawn):
        note = f"<</Type/Annot/Rect[50 50 250 80]{kind}>>"
        assert marked(save(pdf_of(b"", FONT, HELVETICA, note, INK, page="/Annots[6 0 R]"))) is is_drawn

    def test_an_xfa_form_with_pages_of_its_own_is_drawn_without_a_word(self, save, capfd):
        form = "/AcroForm<</Fields[]/XFA 5 0 R>>"
        assert marked(save(pdf_of(b"50 50 200 30 re f", "", stream_of(b"<xdp/>"), catalog=form)))
        assert capfd.readouterr() == ("", "")
        moving = pdf_of(b"50 50 200 30 re f", "", stream_of(b"<xdp/>"), catalog=f"{form}/NeedsRendering true")
        assert (
            reason(save(moving)) == "it is an XFA form, whose pages only Adobe's programs make: print it to a PDF there"
        )
        assert capfd.readouterr() == ("", "")

    def test_a_blank_page_is_a_page(self, save):
        assert open_image(save(pdf_of(b""))).getextrema() == ((255, 255),) * 3
        white = stream_of(b"\xff" * 4, "/Subtype/Image/Width 2/Height 2/BitsPerComponent 8/ColorSpace/DeviceGray")
        scan = pdf_of(b"300 0 0 400 0 0 cm /I Do", "/XObject<</I 5 0 R>>", white)
        assert open_image(save(scan)).getextrema() == ((255, 255),) * 3


class TestRefused:
    @pytest.mark.parametrize(
        ("data", "why"),
        [
            (hostile_pdfs.fine_tiles(0), TOO_LONG),
            (hostile_pdfs.forms_in_forms(9), (TOO_LONG, TOO_LARGE)),  # whichever comes first
            (hostile_pdfs.deflated(6), (TOO_LONG, TOO_LARGE)),
            (hostile_pdfs.broken_codecs(0), NO_PICTURE),
            (hostile_pdfs.locked(0), "the PDF is protected by a password; save a copy without"),
            (hostile_pdfs.cut_off(1), "the PDF is damaged, or has no page"),
            (b"%PDF-", "the PDF is damaged, or has no page"),
            (file_of("<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Count 1/Kids[9 0 R]>>"),
             ("the PDF is damaged: Failed to get page size by index.", "the PDF is damaged, or has no page")),
        ],
        ids=["time", "either", "bomb", "picture", "password", "cut off", "header", "no such page"],
    )  # fmt: skip
    def test_why(self, save, data, why):
        path = save(data)
        assert reason(path) in why
        # Neither what was drawn before nor what this one has left behind changes a reason or a page.
        good, locked = save(hostile_pdfs.good(0), "good.pdf"), save(hostile_pdfs.locked(0), "locked.pdf")
        page = open_image(good).tobytes()
        assert reason(locked) == "the PDF is protected by a password; save a copy without"
        assert reason(path) in why
        assert open_image(good).tobytes() == page

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process takes")
    def test_memory(self, save, monkeypatch):
        monkeypatch.setenv(pdf.SECONDS, "100")
        assert reason(save(hostile_pdfs.forms_in_a_ring(0))) == TOO_LARGE

    def test_a_process_that_ends(self, save):
        path = save(hostile_pdfs.good(0))
        with pdf.PdfFile.opened(path) as document:
            assert document.count == 1
            document._reader.process.kill()
            with pytest.raises(ValueError, match="^the PDF is damaged: PDFium ends with SIGKILL$"):
                document.size(0)
        assert open_image(path).size == (834, 1112)

    def test_a_process_that_the_pdf_before_has_broken(self, save):
        path = save(hostile_pdfs.good(0))
        page = open_image(path).tobytes()
        pdf._readers.idle[0].process.kill()
        pdf._readers.idle[0].process.wait()
        assert open_image(path).tobytes() == page

    def test_bytes_are_as_the_file(self, save):
        data = hostile_pdfs.good(3)
        with pdf.PdfFile.opened(data) as document:
            assert document.image(0, None).tobytes() == open_image(save(data)).tobytes()


class TestAtOnce:
    def test_a_quick_page_passes_slow_ones(self, save, monkeypatch):
        monkeypatch.setenv(pdf.SECONDS, "1")
        slow = [save(hostile_pdfs.fine_tiles(k), f"{k}.pdf") for k in range(6)]
        good, ended = save(hostile_pdfs.good(0), "good.pdf"), []

        def draw(path: str) -> None:
            reason(path)
            ended.append(path)

        threads = [threading.Thread(target=draw, args=(path,)) for path in slow]
        for thread in threads:
            thread.start()
        drawn = [open_image(good).size for _ in range(3)]
        before = len(ended)
        for thread in threads:
            thread.join()
        assert drawn == [(834, 1112)] * 3
        assert before <= 2  # six pages of a second each, two at a time
        assert sorted(ended) == sorted(slow)
        assert len(pdf._readers.idle) <= pdf.MOST_IDLE
        # Nothing was lost on the way: as many may be drawn as before.
        assert [pdf._readers.free.acquire(blocking=False) for _ in range(pdf.PROCESSES + 1)] == [
            True
        ] * pdf.PROCESSES + [False]
        assert [pdf._readers.slow.acquire(blocking=False) for _ in range(pdf.MOST_SLOW + 1)] == [
            True
        ] * pdf.MOST_SLOW + [False]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
    def test_a_forked_process_has_its_own(self, save):
        path = save(hostile_pdfs.good(0))
        open_image(path)
        mine = pdf._readers.idle[0].process.pid
        script = (
            "import os, sys; from mistral_ft.data.picture import pdf; from mistral_ft.data.pages import open_image\n"
            "open_image(sys.argv[1]); mine = pdf._readers.idle[0].process.pid\n"
            "if child := os.fork():\n    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
            "    open_image(sys.argv[1]); sys.exit(code or pdf._readers.idle[0].process.pid != mine)\n"
            "assert not pdf._readers.idle; open_image(sys.argv[1])\n"
            "os._exit(pdf._readers.idle[0].process.pid == mine)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, timeout=100)
        assert done.returncode == 0
        assert pdf._readers.idle[0].process.pid == mine

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_none_outlives_who_started_it(self, save):
        script = (
            "import sys, time; from mistral_ft.data.picture import pdf; from mistral_ft.data.pages import open_image\n"
            "open_image(sys.argv[1]); print(pdf._readers.idle[0].process.pid, flush=True); time.sleep(100)\n"
        )
        command = [sys.executable, "-c", script, save(hostile_pdfs.good(0))]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
            child = int(parent.stdout.readline())
            handle = os.pidfd_open(child)
            parent.send_signal(signal.SIGKILL)
        assert select.select([handle], [], [], 60)[0] == [handle]  # it has ended
        os.close(handle)


class TestSteps:
    @pytest.fixture
    def data(self, save, tmp_path):
        for name, make in (
            ("good", hostile_pdfs.good),
            ("slow", hostile_pdfs.fine_tiles),
            ("locked", hostile_pdfs.locked),
        ):
            save(make(0), f"{name}.pdf")
        rows = [row(k, "A", [f"{name}.pdf"]) for k, name in enumerate(("good", "slow", "good", "locked"))]
        return write_jsonl(tmp_path / "data.jsonl", rows)

    def test_validate_names_each(self, data, run_cli):
        code, out, _ = run_cli("validate_data", data, "--pdf_seconds", 0.3)
        assert code == 1
        assert f"{data}:2: image {data.parent}/slow.pdf cannot be opened: {TOO_LONG}" in out
        assert f"{data}:4: image {data.parent}/locked.pdf cannot be opened: the PDF is protected by a password" in out
        assert "2 fatal problems in 2 of 4 rows" in out

    def test_train_refuses(self, data, run_cli, tmp_path):
        code, _, err = run_cli(
            "train", "--model_id", TINY, "--dataset", data, "--output_dir", tmp_path / "out", "--max_steps", 1,
            "--pdf_seconds", 0.3,
        )  # fmt: skip
        assert code == 2
        assert f"slow.pdf cannot be opened: {TOO_LONG}" in err

    def test_predict_goes_on(self, data, run_cli, tmp_path):
        output = tmp_path / "out.jsonl"
        assert run_cli("predict", data, TINY, "-o", output, "--max_new_tokens", 1, "--pdf_seconds", 0.3)[0] == 1
        errors = [found.get("error") for found in read_rows(output)]
        assert [error and error.split("opened: ")[1] for error in errors] == [
            None, TOO_LONG, None, "the PDF is protected by a password; save a copy without",
        ]  # fmt: skip

    @pytest.mark.parametrize("step", ["train", "predict", "validate_data", "server"])
    def test_the_flag(self, step, run_cli, data, tmp_path):
        command = {
            "train": ["--model_id", TINY, "--dataset", data, "--output_dir", tmp_path / "output", "--max_steps", 1],
            "predict": [data, TINY, "-o", tmp_path / "out.jsonl"],
            "validate_data": [data],
            "server": [data],
        }[step]
        code, _, err = run_cli(step, *command, "--pdf_seconds", 0)
        assert (code, err) == (2, "error: --pdf_seconds 0.0: must be more than 0\n")
