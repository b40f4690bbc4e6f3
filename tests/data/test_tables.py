"""Parquet files and `datasets` folders hold the same records as JSONL, images within them included."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
from PIL import Image

from mistral_ft.data import rows as rows_module
from mistral_ft.data.pages import fingerprint, open_image
from mistral_ft.data.records import image_blocks, read_records
from mistral_ft.data.rows import RowSource, data_files
from mistral_ft.data.tables import open_table
from mistral_ft.errors import UserError
from tests.conftest import ROOT, read_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    open_table.cache_clear()


def png(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (28, 28), color).save(file, "PNG")
    return file.getvalue()


def color_of(reference: str) -> int:
    return open_image(reference).getpixel((0, 0))[0]


def ask(*blocks) -> list:
    return [{"role": "user", "content": [{"type": "text", "text": "Title?"}, *blocks]}]


ROWS = [
    {"messages": ask({"type": "image"}), "expected": "A", "images": [{"bytes": png(1), "path": None}], "n": 1},
    {"messages": ask({"type": "image"}, {"type": "image"}), "expected": "B", "n": None,
     "images": [{"bytes": png(2), "path": "x.png"}, {"bytes": None, "path": "b.png"}]},
    {"messages": ask(), "expected": "C", "images": None, "n": 3},
]  # fmt: skip


def record(name: str, row: int, images: int, **more) -> dict:
    found = [{"type": "image", "image": f"{name}#row={row}&column=images&item={k}"} for k in range(images)]
    return {"messages": ask(*found), "expected": "ABC"[row], **more}


@pytest.fixture
def dataset():
    return datasets.Dataset.from_list(ROWS)


def test_a_parquet_file_holds_records(tmp_path, dataset):
    path = tmp_path / "data" / "a [b].parquet"
    path.parent.mkdir()
    dataset.to_parquet(path, batch_size=2)
    records = read_records([path], expected_required=True)
    assert [r.line for r in records] == [1, 2, 3]
    assert [r.data for r in records] == [
        record("a [b].parquet", 0, 1, n=1),
        record("a [b].parquet", 1, 2),
        record("a [b].parquet", 2, 0, n=3),
    ]
    assert color_of(f"{path}#row=0&column=images&item=0") == 1
    assert color_of(f"{path}#row=1&column=images&item=0") == 2
    (path.parent / "b.png").write_bytes(png(3))
    assert color_of(f"{path}#row=1&column=images&item=1") == 3
    assert fingerprint(f"{path}#row=1&column=images&item=0") == hashlib.sha256(png(2)).hexdigest()
    assert (RowSource(path, path.parent).count(), data_files(path)) == (3, [path])


def test_a_column_of_the_library_s_own_images(tmp_path):
    rows = {"question": ["Q"], "answer": ["A"], "image": [Image.new("L", (28, 28), 7)]}
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    (found,) = read_records([path], expected_required=True)
    reference = "a.parquet#row=0&column=image"
    assert found.data == {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": reference}, {"type": "text", "text": "Q"}]}
        ],
        "expected": "A",
    }
    assert color_of(f"{tmp_path}/{reference}") == 7


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_a_folder_holds_splits(tmp_path, dataset, kind):
    folder = tmp_path / "set"
    if kind == "saved":
        datasets.DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        dataset.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        dataset.select([2]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    assert [r.expected for r in read_records([folder])] == ["A", "B", "C"]
    assert image_blocks(read_records([folder])[0].messages) == ["set#row=0&column=images&item=0"]
    assert [r.expected for r in read_records([f"{folder}:test"])] == ["C"]
    assert color_of(f"{folder}:train#row=0&column=images&item=0") == 1
    assert all(file.is_file() for file in data_files(f"{folder}:test"))
    with pytest.raises(UserError, match=f"^{folder}:dev: no such split; there is train, test$"):
        read_records([f"{folder}:dev"])


def test_a_split_compares_pages_in_tables(tmp_path, run_cli):
    rows = [{"question": f"Q{k}", "answer": "A", "image": {"bytes": png(k // 2), "path": None}} for k in range(8)]
    path, out = tmp_path / "a.parquet", tmp_path / "out.jsonl"
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert run_cli("reformat_data", path, out, "--split", 0.5)[0] == 0
    sides = [{r["id"] for r in read_rows(tmp_path / f"out.{side}.jsonl")} for side in ("train", "test")]
    assert [len(side) for side in sides] == [4, 4]
    for k in (1, 3, 5, 7):  # two rows of one page each
        assert any({f"a-{k}", f"a-{k + 1}"} <= side for side in sides)


def test_images_are_relative_to_the_folder_that_is_given(tmp_path, dataset):
    (tmp_path / "pages").mkdir()
    dataset.to_parquet(tmp_path / "a.parquet")
    (found, *_) = read_records([tmp_path / "a.parquet"], tmp_path / "pages")
    assert image_blocks(found.messages) == ["../a.parquet#row=0&column=images&item=0"]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("#row=9&column=images&item=0", "the table has no such image"),
        ("#row=0&column=pages", "the table has no such image"),
        ("#row=2&column=images&item=0", "the table has no such image"),
        ("#row=1&column=images&item=5", "the table has no such image"),
        ("#row=0&column=expected", "No such file or directory"),
        ("#row=0&column=n", "the table has nothing there"),
        ("#row=3&column=expected", "the table has the path ../A there, which is not below its folder"),
        ("#row=4&column=expected", "the table has the path /etc/A there, which is not below its folder"),
    ],
)
def test_a_wrong_reference_is_named(tmp_path, place, reason):
    rows = [*ROWS, ROWS[0] | {"expected": "../A"}, ROWS[0] | {"expected": "/etc/A"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    whole = f"{tmp_path}/a.parquet{place}"
    ending = " does not exist" if "file" in reason else f" cannot be opened: {reason}"
    with pytest.raises(ValueError, match=re.escape(f"image {whole}{ending}") + "$"):
        open_image(whole)


def test_faults_of_tables_are_one_line(tmp_path, dataset):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"^[^\n]*a.parquet: cannot be read as a table: [^\n]*$"):
        read_records([tmp_path / "a.parquet"])
    with pytest.raises(UserError, match=r"^no/such-set: no such file or folder, and no data set of the hub: [^\n]*$"):
        read_records(["no/such-set"])
    dataset.remove_columns(["expected"]).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet:1: no `expected`"):
        read_records([tmp_path / "b.parquet"], expected_required=True)


def test_a_json_array_is_read_like_lines(tmp_path):
    rows = [{"messages": ask(), "expected": "A"}, {"prompt": "Q", "completion": "B"}]
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=1))
    assert [r.expected for r in read_records([path])] == ["A", "B"]
    assert RowSource(path, path.parent).count() == 2
    path.write_text('[{"messages": [],},\n 2]')
    with pytest.raises(UserError, match=r"a.json: trailing comma at line 1, column 17: JSON allows none, remove it$"):
        read_records([path])
    path.write_text('[\n  // pages of 2024\n  {"text": "a"}]')
    with pytest.raises(UserError, match=r"a.json: a comment at line 2, column 3: JSON allows none, remove it$"):
        read_records([path])


class Hub(BaseHTTPRequestHandler):
    """A hub with one set, org/name, of one parquet file."""

    data: bytes
    file = "data/train-00000-of-00001.parquet"

    def do_GET(self):
        path = self.path.partition("?")[0].removeprefix("/api/datasets/org/name")
        entry = {"type": "file", "path": self.file, "size": len(self.data), "oid": "b" * 40}
        headers = {"ETag": '"1"', "X-Repo-Commit": "a" * 40, "Content-Type": "application/json"}
        if path.startswith("/tree/"):
            folder = {"type": "directory", "path": "data", "oid": "c" * 40}
            body = json.dumps([entry] if path.endswith("/data") else [folder]).encode()
        elif path == "" or path.startswith("/revision/"):
            body = json.dumps({"id": "org/name", "sha": "a" * 40, "siblings": [{"rfilename": self.file}]}).encode()
        elif path.endswith(self.file):
            body = self.data
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_a_set_of_the_hub(tmp_path):
    image = {"bytes": png(7), "path": None}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"question": "Q", "answer": "A", "image": image}]).to_parquet(path)
    Hub.data = path.read_bytes()
    hub = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf")}
    program = (
        "from mistral_ft.data.records import read_records; from mistral_ft.data.pages import open_image\n"
        "(record,) = read_records(['org/name:train'], expected_required=True)\n"
        "print(record.path, record.line, record.expected, open_image(*record.image_paths).getpixel((0, 0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    hub.shutdown()
    assert done.stdout == "org/name:train 1 A (7, 7, 7)\n", done.stderr


@pytest.mark.parametrize(
    ("step", "more", "lines"),
    [
        ("reformat_data", ["out.jsonl"], ["converting: row 1/5", "converting: row 5/5"]),
        ("validate_data", [], ["checking: row 5/5"]),  # as a worker gives them back
    ],
)
def test_a_json_array_is_loaded_once(tmp_path, run_cli, monkeypatch, step, more, lines):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": ask(), "expected": str(number)} for number in range(5)]))
    loaded, load = [], rows_module._load_array
    monkeypatch.setattr(rows_module, "_load_array", lambda path: loaded.append(path) or load(path))
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli(step, path, *more)
    assert code == 0, err
    assert loaded == [path]
    assert [line.partition(",")[0] for line in err.splitlines()] == lines


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_a_file_of_separated_values(tmp_path, suffix, mark):
    (tmp_path / "a.png").write_bytes(png(4))
    rows = [
        ("id", "question", "answer", "image", "score"),
        ("007", "Title?", "A, B", "a.png", ""),
        ("8", "Q", "7", "", "2.5"),
    ]
    quoted = "\n".join(mark.join(f'"{value}"' if "," in value else value for value in row) for row in rows)
    path = tmp_path / f"data.{suffix}"
    path.write_text(quoted)
    first, second = read_records([path], expected_required=True)
    assert (first.expected, first.image_paths) == ("A, B", [str(tmp_path / "a.png")])
    assert "score" not in first.data
    assert second.image_paths == []
    assert second.data["score"] == 2.5


def test_columns_of_several_right_answers(tmp_path):
    rows = [{"prompt": f"Q{k}", "completion": answers} for k, answers in enumerate((["A", "B"], [], ["C", None]))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    reason = "`completion` is an empty list; name at least one right answer in it, or leave it out"
    with pytest.raises(UserError, match=f"data.parquet:2: {reason} .and 1 more bad rows, on lines 3."):
        read_records([tmp_path / "data.parquet"])
    datasets.Dataset.from_list(rows[:1]).to_parquet(tmp_path / "good.parquet")
    (record,) = read_records([tmp_path / "good.parquet"], expected_required=True)
    assert record.data == {"messages": [{"role": "user", "content": "Q0"}], "expected": ["A", "B"]}
