"""PDFs made to hang, swell or crash what draws them, and one that is good, through validate, predict and the server.

    python -m bench.hostile_pdfs /tmp/hostile [--count 200]

Writes the files and `rows.jsonl`, good and hostile rows in turns, runs each step on them as a user does, and prints how
long it took, what was said of hostile pages and how often, the peak memory of all its processes together, and how long
the server took for a good page while hostile ones were asked for and while none was.
"""

import argparse
import collections
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ROOT / "models" / "tiny"


def pdf_of(contents: bytes, resources: str = "", *objects: bytes | str, page: str = "", catalog: str = "") -> bytes:
    """A PDF of one page of 300 x 400 points.

    Args:
        contents: what is drawn.
        resources: the inside of its dictionary; `objects` are 5 0 R, 6 0 R, …
        page, catalog: more entries of these dictionaries; the page's own come first.
    """
    box = "" if "/MediaBox" in page else "/MediaBox[0 0 300 400]"
    return file_of(
        f"<</Type/Catalog/Pages 2 0 R {catalog}>>",
        "<</Type/Pages/Count 1/Kids[3 0 R]>>",
        f"<</Type/Page/Parent 2 0 R{box}/Contents 4 0 R/Resources<<{resources}>>{page}>>",
        stream_of(contents),
        *objects,
    )


def stream_of(data: bytes, entries: str = "") -> bytes:
    """A stream object."""
    return f"<<{entries}/Length {len(data)}>>stream\n".encode() + data + b"\nendstream"


def form_of(data: bytes, resources: str = "", entries: str = "/BBox[0 0 300 400]") -> bytes:
    """A form: what is drawn where a page says so."""
    return stream_of(data, f"/Type/XObject/Subtype/Form{entries}/Resources<<{resources}>>")


def file_of(*objects: bytes | str, trailer: str = "") -> bytes:
    """A PDF of these objects, numbered from 1; the first is the catalog."""
    out, places = bytearray(b"%PDF-1.7\n"), []
    for number, data in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n".encode() + (data.encode() if isinstance(data, str) else data) + b"\nendobj\n"
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{place:010} 00000 n \n".encode() for place in places)
    out += f"trailer<</Size {len(objects) + 1}/Root 1 0 R{trailer}>>\nstartxref\n{start}\n%%EOF".encode()
    return bytes(out)


def good(k: int) -> bytes:
    """A page of print."""
    lines = b"".join(
        b"1 0 0 1 20 %d Tm (Invoice %d, line %d of this page) Tj " % (380 - 12 * n, k, n) for n in range(30)
    )
    font = "/Font<</F<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>"
    return pdf_of(b"BT /F 9 Tf " + lines + b"ET", font)


def forms_in_a_ring(k: int) -> bytes:
    names = range(5, 6 + k % 4)
    ring = [
        form_of(b"/F Do " * (2 + k % 3), f"/XObject<</F {names[(n + 1) % len(names)]} 0 R>>") for n in range(len(names))
    ]
    return pdf_of(b"/F Do", "/XObject<</F 5 0 R>>", *ring)


def forms_in_forms(k: int) -> bytes:
    depth = 18 + k
    forms = [form_of(b"/F Do /F Do", f"/XObject<</F {6 + n} 0 R>>") for n in range(depth)]
    return pdf_of(b"/F Do", "/XObject<</F 5 0 R>>", *forms, form_of(b"0 0 300 400 re f"))


def fine_tiles(k: int) -> bytes:
    step = 0.02 / (1 + k)
    tile = f"/Type/Pattern/PatternType 1/PaintType 1/TilingType 1/BBox[0 0 5 5]/XStep {step}/YStep {step}/Resources<<>>"
    fill = b"/Pattern cs /P scn 0 0 300 400 re f"
    return pdf_of(fill, "/Pattern<</P 5 0 R>>", stream_of(b"1 0 0 rg 0 0 3 3 re f", tile))


def tiles_in_tiles(k: int) -> bytes:
    fill, tiles = b"/Pattern cs /P scn 0 0 300 400 re f", []
    for n in range(4 + k):
        entries = "/Type/Pattern/PatternType 1/PaintType 1/TilingType 1/BBox[0 0 300 400]/XStep 2/YStep 2"
        tiles.append(stream_of(fill, f"{entries}/Resources<</Pattern<</P {6 + n} 0 R>>>>"))
    return pdf_of(fill, "/Pattern<</P 5 0 R>>", *tiles, stream_of(b"0 0 1 1 re f", entries + "/Resources<<>>"))


def strokes(k: int) -> bytes:
    draw = random.Random(k)
    lines = " ".join(f"{draw.random() * 300:.2f} {draw.random() * 400:.2f} l" for _ in range(40_000 * (1 + k)))
    return pdf_of(f"[1 1] 0 d 3 w 0 0 m {lines} S".encode())


def many_pages(k: int) -> bytes:
    count = 5000 * (1 + k)
    kids = " ".join(f"{5 + n} 0 R" for n in range(count))
    page = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 400]/Contents 4 0 R/Resources<<>>>>"
    return file_of(
        "<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Count {count}/Kids[{kids}]>>", "null",
        stream_of(b"0 0 9 9 re f"), *[page] * count,
    )  # fmt: skip


def deflated(k: int) -> bytes:
    packer, part = zlib.compressobj(1), b"0 0 9 9 re f " * (1 << 20)
    data = b"".join(packer.compress(part) for _ in range(1 << min(k, 6))) + packer.flush()
    if k % 2:
        data = zlib.compress(data, 9)
    filters = "/FlateDecode " * (1 + k % 2)
    catalog, pages = "<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Count 1/Kids[3 0 R]>>"
    page = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 400]/Contents 4 0 R/Resources<<>>>>"
    return file_of(catalog, pages, page, stream_of(data, f"/Filter[{filters}]"))


def huge_image(k: int) -> bytes:
    side = 20_000 * (1 + k)
    data = zlib.compress(bytes(1 << 27), 1)
    entries = f"/Type/XObject/Subtype/Image/Width {side}/Height {side}/BitsPerComponent 8/ColorSpace/DeviceRGB"
    return pdf_of(b"300 0 0 400 0 0 cm /I Do", "/XObject<</I 5 0 R>>", stream_of(data, entries + "/Filter/FlateDecode"))


def odd_boxes(k: int) -> bytes:
    boxes = ("0 0 1e9 1e9", "0 0 0 0", "0 0 -300 -400", "0 0 1e-9 400", "nan 0 inf 400", "0 0 99999 1", "5 5 5 5",
             "0 0 1e38 1e38", "-1e9 -1e9 1e9 1e9", "0 0 400")  # fmt: skip
    return pdf_of(b"0 0 9 9 re f", page=f"/MediaBox[{boxes[k % len(boxes)]}]")


def deep_arrays(k: int) -> bytes:
    depth = 20_000 * (1 + k)
    return pdf_of(b"[" * depth + b"]" * depth + b" TJ", "/X " + "[" * depth + "]" * depth)


def looped_xrefs(k: int) -> bytes:
    whole = good(k)
    start = whole.rindex(b"startxref")
    place = int(whole[start + 10 :].split()[0])
    loop = whole.replace(b"/Root 1 0 R", f"/Root 1 0 R/Prev {place - k % 2}".encode())
    return loop if k < 5 else loop[: len(loop) * k // 11]


def looped_pages(k: int) -> bytes:
    kids = "2 0 R " * (1 + k) + "3 0 R"
    return file_of("<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Count {10**k}/Kids[{kids}]/Parent 2 0 R>>",
                   "<</Type/Pages/Count 9/Kids[2 0 R 3 0 R]/Parent 2 0 R>>")  # fmt: skip


def slow_shading(k: int) -> bytes:
    program = b"{ " + b"sin cos 2 exp " * (2000 * (1 + k)) + b"}"
    function = stream_of(program, "/FunctionType 4/Domain[0 1 0 1]/Range[0 1]")
    shading = "<</ShadingType 1/ColorSpace/DeviceGray/Domain[0 1 0 1]/Matrix[300 0 0 400 0 0]/Function 6 0 R>>"
    return pdf_of(b"/S sh " * 50, "/Shading<</S 5 0 R>>", shading, function)


def glyphs_in_glyphs(k: int) -> bytes:
    font = ("<</Type/Font/Subtype/Type3/FontBBox[0 0 9 9]/FontMatrix[1 0 0 1 0 0]/FirstChar 97/LastChar 97/Widths[9]"
            "/CharProcs<</a 6 0 R>>/Encoding<</Differences[97/a]>>/Resources<</Font<</F 5 0 R>>>>>>")  # fmt: skip
    glyph = b"9 0 d0 BT /F 1 Tf (" + b"a" * (2 + k) + b") Tj ET"
    return pdf_of(b"BT /F 9 Tf (aaa) Tj ET", "/Font<</F 5 0 R>>", font, stream_of(glyph))


def groups(k: int) -> bytes:
    depth = 10 * (1 + k)
    entries = "/BBox[0 0 300 400]/Group<</S/Transparency/I true>>"
    state = "/ExtGState<</G<</ca 0.5/SMask<</S/Luminosity/G {0} 0 R>>>>>>/XObject<</F {0} 0 R>>"
    forms = [form_of(b"/G gs /F Do /F Do", state.format(6 + n), entries) for n in range(depth)]
    return pdf_of(b"/G gs /F Do", state.format(5), *forms, form_of(b"0 0 300 400 re f", "", entries))


def annotations(k: int) -> bytes:
    count = 10_000 * (1 + k)
    refs = "5 0 R " * count
    note = "<</Type/Annot/Subtype/Stamp/Rect[0 0 300 400]/F 4/AP<</N 6 0 R>>>>"
    return pdf_of(b"", "", note, form_of(b"0 0 300 400 re f " * 50), page=f"/Annots[{refs}]")


def broken_codecs(k: int) -> bytes:
    codec = ("DCTDecode", "JPXDecode", "JBIG2Decode", "CCITTFaxDecode", "LZWDecode")[k % 5]
    data = (b"\xff\xd8\xff" if k % 5 == 0 else b"") + random.Random(k).randbytes(50_000)
    entries = (
        f"/Type/XObject/Subtype/Image/Width 60000/Height 60000/BitsPerComponent 1/ColorSpace/DeviceGray/Filter/{codec}"
    )
    return pdf_of(b"300 0 0 400 0 0 cm /I Do", "/XObject<</I 5 0 R>>", stream_of(data, entries))


def locked(k: int) -> bytes:
    entry = "/Encrypt<</Filter/Standard/V 1/R 2/P -4/O(%s)/U(%s)>>/ID[(a)(b)]" % ("o" * 32, "u" * 32)  # noqa: UP031
    whole = good(k).replace(b"/Root 1 0 R", b"/Root 1 0 R" + entry.encode())
    return whole if k % 2 == 0 else whole.replace(b"/V 1/R 2", b"/V 9/R 9")


def scrambled(k: int) -> bytes:
    draw, whole = random.Random(k), bytearray(good(k))
    for _ in range(20 * (1 + k)):
        whole[draw.randrange(9, len(whole))] = draw.randrange(256)
    return bytes(whole)


def cut_off(k: int) -> bytes:
    return good(k)[: 12 + 150 * k]


KINDS: list[Callable[[int], bytes]] = [
    forms_in_a_ring, forms_in_forms, fine_tiles, tiles_in_tiles, strokes, many_pages, deflated, huge_image, odd_boxes,
    deep_arrays, looped_xrefs, looped_pages, slow_shading, glyphs_in_glyphs, groups, annotations, broken_codecs, locked,
    scrambled, cut_off,
]  # fmt: skip


def write_rows(folder: Path, count: int) -> Path:
    """The files, and good and hostile rows in turns; the data file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "good.pdf").write_bytes(good(0))
    rows = folder / "rows.jsonl"
    with open(rows, "w") as file:
        for number in range(count):
            k, kind = number // len(KINDS), KINDS[number % len(KINDS)]
            name = f"{kind.__name__}-{k}.pdf"
            (folder / name).write_bytes(kind(k))
            for page in ("good.pdf", f"{name}#page=1"):
                content = [{"type": "image", "image": page}, {"type": "text", "text": f"Title of {number}?"}]
                row = {"messages": [{"role": "user", "content": content}], "expected": "A", "id": f"{page} {number}"}
                file.write(json.dumps(row) + "\n")
    return rows


def small_pages(folder: Path) -> Path:
    """The embedded base, which sees pages of at most 280 px: reading answers from large ones takes a CPU seconds."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    settings = folder / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"size": {"longest_edge": 280}}))
    return folder


def family(pid: int) -> list[int]:
    """A process and all that it has started (Linux)."""
    children = collections.defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children[int((entry / "stat").read_text().rpartition(")")[2].split()[1])].append(int(entry.name))
    found = [pid]
    for parent in found:
        found += children[parent]
    return found


def memory_mib(pid: int) -> float:
    """What a process and all that it has started hold, shared memory counted once for each."""
    pages = 0
    for member in family(pid):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{member}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


@contextlib.contextmanager
def watched(*command: object) -> Iterator[tuple[subprocess.Popen[str], list[float]]]:
    """A step that runs, and the memory it has had in MiB."""
    words = [sys.executable, "-m", *map(str, command)]
    step = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    memory = [0.0]

    def look() -> None:
        while step.poll() is None:
            memory.append(memory_mib(step.pid))
            time.sleep(0.5)

    threading.Thread(target=look, daemon=True).start()
    try:
        yield step, memory
    finally:
        step.terminate()
        step.wait()


def run(title: str, *command: object) -> None:
    started = time.perf_counter()
    with watched(*command) as (step, memory):
        output, _ = step.communicate()
    seconds = time.perf_counter() - started
    said = re.findall(r"cannot be opened: ([^\n]+)", output)
    print(f"{title}: {seconds:.0f} s, exit code {step.returncode}, peak {max(memory):,.0f} MiB, {len(said)} lines:")
    for reason, count in collections.Counter(said).most_common():
        print(f"  {count:4} {reason}")


def timed_page(port: int, row: int) -> float:
    """Seconds that the server takes for a row's page."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("GET", f"/api/image?row={row}&image=0&page=0")
    connection.getresponse().read()
    return time.perf_counter() - started


def serve(rows: Path, count: int, seconds: float, at_once: int) -> None:
    """Ask for hostile pages from several threads until all are answered, and for the good one meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with watched("server", rows, "--port", port, "--pdf_seconds", seconds) as (_, memory):
        for _ in range(100):
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                timed_page(port, 0)
                break
        time.sleep(3)  # until the file is indexed
        alone = [timed_page(port, 0) for _ in range(20)]
        left = iter(range(1, 2 * count, 2))
        lock = threading.Lock()

        def ask() -> None:
            while True:
                with lock:
                    row = next(left, None)
                if row is None:
                    return
                timed_page(port, row)

        threads = [threading.Thread(target=ask) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        meanwhile = []
        while any(thread.is_alive() for thread in threads):
            meanwhile.append(timed_page(port, 0))
            time.sleep(0.1)
    ordered = sorted(meanwhile)
    print(
        f"server: {count} hostile pages, {at_once} at a time, peak {max(memory):,.0f} MiB; a good page takes "
        f"{statistics.median(alone):.3f} s alone, meanwhile {statistics.median(ordered):.3f} s, "
        f"{ordered[len(ordered) * 99 // 100]:.3f} s at 99 %, {ordered[-1]:.3f} s at most ({len(ordered)} times)"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200, help="hostile files")
    parser.add_argument("--pdf_seconds", type=float, default=20, help="as for the steps; fewer make this shorter")
    parser.add_argument("--at_once", type=int, nargs="+", default=[1, 6], help="hostile pages asked of the server")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rows = write_rows(args.folder, args.count)
    seconds = ["--pdf_seconds", args.pdf_seconds]
    model = small_pages(args.folder / "model")
    run("validate", "validate_data", rows, "--model_id", model, "--all", *seconds)
    answers = ["-o", args.folder / "out.jsonl", "--overwrite", "--max_new_tokens", 4]
    run("predict", "predict", rows, model, *answers, *seconds)
    for at_once in args.at_once:
        serve(rows, args.count, args.pdf_seconds, at_once)


if __name__ == "__main__":
    main()
