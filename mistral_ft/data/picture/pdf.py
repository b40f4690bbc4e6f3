"""PDFs, drawn by PDFium in processes of their own: one that makes it hang, swell or crash costs its page, by name.

A process that reads pages has one of them for each PDF that is open, and keeps it. They are asked over pipes: a
line of JSON asks or answers, and a PDF's bytes or a page's pixels follow it.
"""

import contextlib
import functools
import json
import math
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

from PIL import Image

from mistral_ft.files import JsonObject

if TYPE_CHECKING:
    import pypdfium2

    from mistral_ft.data.image_fitter import ImageFitter

DPI = 200  # of pages that are drawn for no model
MOST_PIXELS = 25_000_000  # that such a page may have

SECONDS = "MISTRAL_FT_PDF_SECONDS"  # the environment reaches every worker process, however it is started
DEFAULT_SECONDS = 20.0  # of one processor's work that a page may take; a page of print takes 0.05
MEMORY = 1 << 30  # bytes that drawing may take, where the system sees to it: on Linux
MOST_KEPT = 1 << 28  # bytes of addresses with which a process waits for the next PDF

# Pages that take long must not be in the way of others on the review page: what has worked for longer than `QUICK` may
# go on if fewer than `MOST_SLOW` do; if not, it begins again when it may.
PROCESSES = 8  # at a time
MOST_IDLE = 3
QUICK = 0.1  # seconds of work
STARTING = 0.2  # seconds that a process works before it can draw
MOST_SLOW = 2

TOO_SLOW = 75  # exit code where no signal says so
REASONS = {
    "SIGPROF": "drawing it takes more than {seconds:g} s: save the page as an image, or raise --pdf_seconds",
    "SIGABRT": "drawing it takes more than {gib:g} GiB of memory: save the page as an image",
}


class PdfFile:
    """A PDF. Everything raises ValueError with the reason, in one line, where it cannot be read or drawn.

    Args:
        source: its path or its bytes.
    """

    def __init__(self, source: str | bytes):
        self.source = os.path.abspath(source) if isinstance(source, str) else source
        self._reader: _Reader | None = None
        self._is_slow = False

    @classmethod
    @contextlib.contextmanager
    def opened(cls, source: str | bytes) -> Iterator["PdfFile"]:
        pdf = cls(source)
        with _readers.free:
            try:
                yield pdf
            finally:
                pdf._close()

    @functools.cached_property
    def count(self) -> int:
        return self._ask({"pages": True})["pages"]

    def size(self, page: int, fitter: "ImageFitter | None" = None) -> tuple[int, int]:
        """The (width, height) of a page as it is drawn, in pixels."""
        width, height = self._ask({"size": page, "edge": fitter and fitter.longest_edge})["size"]
        return width, height

    def image(self, page: int, fitter: "ImageFitter | None") -> Image.Image:
        drawn = self._ask({"draw": page, "edge": fitter and fitter.longest_edge})
        return Image.frombuffer("RGB", drawn["size"], drawn["pixels"], "raw", drawn["mode"], drawn["stride"], 1)

    def _ask(self, request: JsonObject) -> dict[str, Any]:
        while True:
            if self._reader is None:
                self._reader = _readers.take()
                self._reader.open(self.source)
            try:
                answer = self._reader.ask(request, self._may_be_slow)
            except _ReaderLostError as lost:
                self._get_over(lost, self._reader)
                continue
            if "error" in answer:
                raise ValueError(answer["error"])
            return answer

    def _get_over(self, lost: "_ReaderLostError", reader: "_Reader") -> None:
        """Prepare another try, or raise ValueError."""
        self._reader = None
        if lost.reason == "in the way":
            _readers.free.release()
            _readers.slow.acquire()
            self._is_slow = True
            _readers.free.acquire()
        elif reader.answered or reader.opened == 1:  # or the PDF before may have broken it
            reason = REASONS.get(lost.reason, f"the PDF is damaged: PDFium ends with {lost.reason}")
            raise ValueError(reason.format(seconds=_seconds(), gib=MEMORY / 2**30))

    def _may_be_slow(self) -> bool:
        self._is_slow = self._is_slow or _readers.slow.acquire(blocking=False)
        return self._is_slow

    def _close(self) -> None:
        if self._reader:
            self._reader.close()
            if len(_readers.idle) < MOST_IDLE:
                _readers.idle.append(self._reader)
        if self._is_slow:
            _readers.slow.release()


def _seconds() -> float:
    return float(os.environ.get(SECONDS, DEFAULT_SECONDS))


class _ReaderLostError(Exception):
    """A process has ended. `reason` is the signal's name, an exit code, or "in the way" of quicker ones."""

    def __init__(self, reason: str):
        self.reason = reason


class _Reader:
    """A process that runs `serve`.

    Attributes:
        opened: PDFs so far.
        answered: questions about the one that is open.
    """

    def __init__(self) -> None:
        # As multiprocessing's "spawn" would, but without the main module, which may import torch.
        code = f"import sys; sys.path[:] = {sys.path!r}; from mistral_ft.data.picture.pdf import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-IS", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, pipesize=1 << 20, start_new_session=True,
        )  # fmt: skip
        self.opened = self.answered = 0

    def open(self, source: str | bytes) -> None:
        self.opened, self.answered = self.opened + 1, 0
        data = b"" if isinstance(source, str) else source
        where: JsonObject = {"path": source} if isinstance(source, str) else {"bytes": len(source)}
        self._send({"seconds": _seconds(), "memory": MEMORY} | where, data)

    def close(self) -> None:
        self._send({"close": True})

    def ask(self, request: JsonObject, may_be_slow: Callable[[], bool]) -> dict[str, Any]:
        """The answer; raises _ReaderLostError.

        Args:
            may_be_slow: whether this may go on when it has worked for longer than `QUICK`.
        """
        answers = self.process.stdout
        assert answers
        self._send(request)
        if os.name != "nt":  # where a pipe cannot be waited for, and the review page does not run
            self._wait(answers, may_be_slow)
        try:
            answer = json.loads(answers.readline())
            if "draw" in request and "error" not in answer:
                length = answer["stride"] * answer["size"][1]
                answer["pixels"] = answers.read(length)
                if len(answer["pixels"]) < length:
                    raise EOFError
        except (OSError, EOFError, ValueError):  # ValueError: the line is empty or cut off
            code = self.process.wait()
            reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise _ReaderLostError("SIGPROF" if code == TOO_SLOW else reason) from None
        self.answered += 1
        return answer

    def _wait(self, answers: IO[bytes], may_be_slow: Callable[[], bool]) -> None:
        """Wait for an answer until it may be slow to come; raises _ReaderLostError if it may not."""
        before, worked = self._worked(), 0.0
        most = QUICK if self.answered or self.opened > 1 else QUICK + STARTING
        while not multiprocessing.connection.wait([answers.fileno()], most - worked + 0.02):
            worked = self._worked() - before
            if worked < most:
                continue
            if may_be_slow():
                return
            self.process.kill()
            self.process.wait()
            raise _ReaderLostError("in the way")

    def _worked(self) -> float:
        """Seconds of a processor that the process has had; where that is not known, of the clock."""
        try:
            with open(f"/proc/{self.process.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return time.monotonic()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _send(self, request: JsonObject, data: bytes = b"") -> None:
        assert self.process.stdin
        with contextlib.suppress(OSError):  # if it has ended, its answer will say so
            self.process.stdin.write(json.dumps(request).encode() + b"\n" + data)
            self.process.stdin.flush()


class _Readers:
    """The processes of this one, and how many threads may use them."""

    def __init__(self) -> None:
        self.idle: list[_Reader] = []
        self.free = threading.Semaphore(PROCESSES)
        self.slow = threading.Semaphore(MOST_SLOW)

    def take(self) -> _Reader:
        with contextlib.suppress(IndexError):
            while True:
                reader = self.idle.pop()
                if reader.process.poll() is None:
                    return reader
        return _Reader()


_readers = _Readers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_readers.__init__)  # type: ignore[misc]  # the parent's are its own


def serve() -> None:
    """Answer what `_Reader` asks until its pipe ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pdf: pypdfium2.PdfDocument | str = ""  # the open one, or why there is none
    while line := requests.readline():
        request, pixels = json.loads(line), b""
        if "seconds" in request:
            pdf = _open(request, requests.read(request.get("bytes", 0)))
            continue
        if "close" in request:
            if not isinstance(pdf, str):
                pdf.close()
            _limit_seconds(0)
            if _memory() > MOST_KEPT:
                return
            continue
        try:
            if isinstance(pdf, str):
                raise ValueError(pdf)
            answer, pixels = _answer(pdf, request)
        except ValueError as error:
            answer = {"error": str(error)}
        except Exception as error:  # pypdfium2 raises whatever a damaged file leads to
            answer = {"error": f"the PDF is damaged: {str(error) or repr(error)}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.write(pixels)
        answers.flush()


def _limit_seconds(seconds: float) -> None:
    """End this process after so many seconds of work; 0 for no end."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        return
    for timer in threading.enumerate():
        if isinstance(timer, threading.Timer):
            timer.cancel()  # that of the PDF before
    if seconds:
        timer = threading.Timer(seconds, os._exit, (TOO_SLOW,))
        timer.daemon = True
        timer.start()


def _memory() -> int:
    """Bytes of addresses that this process has; 0 where it cannot be known."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")


def _open(request: JsonObject, data: bytes) -> "pypdfium2.PdfDocument | str":
    """The PDF that a request names; or why it cannot be opened."""
    import pypdfium2

    _limit_seconds(request["seconds"])
    if sys.platform == "linux":
        import resource

        most = _memory() + request["memory"]  # beside what it has: which PDFs came before must not matter
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    raw = pypdfium2.raw
    raw.FPDF_LoadMemDocument(b"", 0, None)  # an error's code stays until the next, and not every error sets one
    try:
        file = open(request["path"], "rb") if "path" in request else data  # noqa: SIM115 - the PDF closes it
        pdf = pypdfium2.PdfDocument(file, autoclose=True)
        if pdf.get_formtype() == raw.FORMTYPE_XFA_FULL:
            return "it is an XFA form, whose pages only Adobe's programs make: print it to a PDF there"
        pdf.init_forms()  # or what was filled in is not drawn
        return pdf
    except pypdfium2.PdfiumError as error:
        if error.err_code == raw.FPDF_ERR_PASSWORD:
            return "the PDF is protected by a password; save a copy without"
        if error.err_code == raw.FPDF_ERR_FORMAT:
            return "the PDF is damaged, or has no page"
        return f"the PDF is damaged: {error}"
    except Exception as error:
        return getattr(error, "strerror", None) or str(error) or repr(error)


def _answer(pdf: "pypdfium2.PdfDocument", request: JsonObject) -> tuple[JsonObject, bytes]:
    """The answer to a request, and what follows it."""
    if "pages" in request:
        return {"pages": len(pdf)}, b""
    width, height = pdf.get_page_size(request.get("size", request.get("draw")))
    if request["edge"]:
        scale = request["edge"] / max(width, height)
    else:
        scale = min(DPI / 72, (MOST_PIXELS / (width * height)) ** 0.5)  # pixels per point, which is 1/72 inch
    scale *= 1 - 1e-6  # sizes are 32-bit floats: a little more would be rounded up to a pixel more
    if "size" in request:
        return {"size": (math.ceil(width * scale), math.ceil(height * scale))}, b""  # as PdfPage.render rounds
    with contextlib.closing(_page(pdf, request["draw"])) as page:
        bitmap = page.render(scale=scale)
        _check_pictures(page, bitmap)
    return {"size": (bitmap.width, bitmap.height), "mode": bitmap.mode, "stride": bitmap.stride}, bitmap.buffer


def _page(pdf: "pypdfium2.PdfDocument", number: int) -> "pypdfium2.PdfPage":
    """A page, with the fields of a form that the PDF does not mention: programs that merge PDFs lose it."""
    from pypdfium2 import raw

    page = pdf[number]
    if pdf.formenv is None:
        for place in range(raw.FPDFPage_GetAnnotCount(page)):
            annotation = raw.FPDFPage_GetAnnot(page, place)
            kind = raw.FPDFAnnot_GetSubtype(annotation)
            raw.FPDFPage_CloseAnnot(annotation)
            if kind == raw.FPDF_ANNOT_WIDGET:
                raw.FPDFPage_Flatten(page, raw.FLAT_NORMALDISPLAY)
                page.close()
                return pdf[number]
    return page


def _check_pictures(page: "pypdfium2.PdfPage", bitmap: "pypdfium2.PdfBitmap") -> None:
    """Raises ValueError if a page is blank because PDFium cannot decode its pictures, which it does not say."""
    import pypdfium2

    rows = memoryview(bitmap.buffer).cast("B")
    first = bytes(rows[: bitmap.stride])
    if any(bytes(rows[k : k + bitmap.stride]) != first for k in range(0, len(rows), bitmap.stride)):
        return
    for picture in page.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE]):
        try:
            picture.get_bitmap().close()
        except pypdfium2.PdfiumError:
            raise ValueError("its pictures are damaged or too large to be drawn: save the page as an image") from None
