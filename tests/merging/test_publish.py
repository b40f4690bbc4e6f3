"""Model cards, and uploads to a hub that is not there."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, errors

from mistral_ft.folders import MODEL_ID, find_quantization, is_hub_id
from mistral_ft.model.card import write_model_card
from tests.conftest import ROOT, TINY, row, write_jsonl
from tests.helpers.adapters import make_adapter

TOKEN = "hf_secretsecret"


def test_the_card_of_a_merged_model(tmp_path):
    run = {
        "data": {
            "files": [{"path": f"/home/me/{n}/invoices.jsonl", "sha256": f"{n}123abc"} for n in (0, 1)],
            "rows": 4500,
        },
        "settings": {
            "lora": {"lora_rank": 8, "init_adapter": "/home/me/output/sunny-owl-12/checkpoint-4"},
            "training": {"learning_rate": 1e-4, "num_train_epochs": 3, "output_dir": "/home/me/output"},
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }
    adapter = {"r": 8, "lora_alpha": 16, "use_dora": True}
    (tmp_path / "preprocessor_config.json").touch()
    write_model_card(tmp_path, "invoices", "transformers", MODEL_ID, adapter, run, {"accuracy": "9/10 = 0.9000"})
    text = (tmp_path / "README.md").read_text()
    assert (
        text
        == f"""\
---
base_model: {MODEL_ID}
library_name: transformers
license: apache-2.0
pipeline_tag: image-text-to-text
tags:
- mistral3
- lora
---

# invoices

[{MODEL_ID}](https://huggingface.co/{MODEL_ID}) with a LoRA adapter merged into its weights.

## Training

| | |
|---|---|
| data: invoices.jsonl | SHA-256 `0123abc`, SHA-256 `1123abc` |
| records | 4,500 |
| adapter | DoRA, rank 8, alpha 16 |
| adapter that it began with | sunny-owl-12/checkpoint-4 |
| learning_rate | 0.0001 |
| num_train_epochs | 3 |
| packages | python 3.11.7, torch 2.13.0 |

## Scores

| | |
|---|---|
| accuracy | 9/10 = 0.9000 |

## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("<this folder>", dtype="bfloat16", device_map="auto")
processor = AutoProcessor.from_pretrained("<this folder>")
```

or `vllm serve <this folder>`.

The prompt is what the user wrote: no system message is added.
"""
    )


def test_the_card_of_a_model_that_reads_text_only(tmp_path):
    write_model_card(
        tmp_path, "laws", "transformers", "mistralai/Mistral-7B-Instruct-v0.3", {"r": 8, "lora_alpha": 16}, {}
    )
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.pipeline_tag == "text-generation"
    assert 'AutoModelForCausalLM.from_pretrained("<this folder>", dtype="bfloat16", device_map="auto")' in text
    assert "ImageTextToText" not in text


def test_train_writes_the_adapters_card(pages, train_tiny):
    run = train_tiny(pages / "train.jsonl", "--max_steps", 1, "--lora_rank", 4)
    text = (run / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "image-text-to-text")
    assert card.data.base_model is None  # the hub takes no folders
    assert card.data.license is None
    assert card.text.strip().startswith(f"# {run.name}\n\nA LoRA adapter for `tiny`.\n")
    assert "| records | 8 |\n| adapter | LoRA, rank 4, alpha 32 |\n| learning_rate | 0.002 |\n| max_steps | 1 |" in text
    assert str(TINY.parent) not in text
    assert str(pages) not in text


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("someone/model-4bit")
    assert not is_hub_id("models/tiny")
    assert not is_hub_id("/data/model")
    assert find_quantization("someone/model-4bit") == "4-bit"
    assert find_quantization("someone/model") is None
    assert find_quantization("models/tiny") is None


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of a small folder needs; keeps what it is sent."""

    repos: dict
    seen: list

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            return self.reply({"name": "me", "type": "user", "auth": {"type": "access_token"}})
        repo = self.repos.get(self.path.removeprefix("/api/models/").partition("?")[0])
        if repo is None:
            return self.reply({"error": "Repository not found"}, 404, "RepoNotFound")
        return self.reply({"_id": "1", "id": "me/merged", "private": repo["private"], "siblings": [], "tags": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            private = asked.get("private") is True or asked.get("visibility") == "private"
            self.repos["me/merged"] = {"private": private, "files": {}}
            return self.reply({"url": f"http://{self.headers['Host']}/me/merged", "id": "1", "name": "me/merged"})
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.reply({"files": [file | {"shouldIgnore": False} for file in files]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repos["me/merged"]["files"][line["value"]["path"]] = content
            return self.reply(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/merged/commit/0",
                    "commitOid": "0" * 40,
                    "success": True,
                    "hookOutput": "",
                }
            )
        return self.reply({"error": f"what is {self.path}?"}, 400)

    def reply(self, data, status=200, code=None):
        body = json.dumps(data).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_merged_folder_is_uploaded_whole_and_the_token_is_never_shown(tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    Hub.repos, Hub.seen = {}, []
    hub = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
    }
    merged = tmp_path / "merged"
    command = [sys.executable, "-m", "merge_lora_weights", adapter, merged, "--push_to_hub", "me/merged", "--private"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    hub.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Uploaded to http://127.0.0.1:{hub.server_port}/me/merged"
    assert Hub.repos["me/merged"]["private"]
    assert Hub.repos["me/merged"]["files"] == {path.name: path.read_bytes() for path in merged.iterdir()}
    assert set(Hub.seen) == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in content for content in Hub.repos["me/merged"]["files"].values())


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for HfApi, to be told what to answer."""

    def answer(status: int, text: str = "", kind=errors.HfHubHTTPError):
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        return kind(f"{status}", response=response, server_message=text or None)

    def give(name, result):
        def call(*args, **kwargs):
            if isinstance(result, Exception):
                raise result
            return result

        setattr(api, name, call)

    api = SimpleNamespace(give=give, error=answer)
    give("whoami", {})
    give("model_info", answer(404, kind=errors.RepositoryNotFoundError))
    give("create_repo", "http://hub/me/merged")
    give("upload_folder", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return api


def info(private=False, *names):
    return SimpleNamespace(private=private, siblings=[SimpleNamespace(rfilename=name) for name in names])


@pytest.fixture
def push(run_cli, tmp_path):
    def push(*arguments, repo="me/merged") -> str:
        adapter = make_adapter(tmp_path / "adapter")
        code, out, err = run_cli("merge_lora_weights", adapter, tmp_path / "merged", "--push_to_hub", repo, *arguments)
        assert code == 2
        assert TOKEN not in out + err
        return err.splitlines()[-1].removeprefix("error: ")

    return push


def test_what_would_stop_an_upload_is_said_before_the_merge(hub, push, tmp_path, monkeypatch):
    hub.give("model_info", info(False))
    assert push("--private") == "--push_to_hub me/merged: is there already and public; --private cannot change that"
    hub.give("model_info", info(False, ".gitattributes", "model.safetensors"))
    assert push() == "--push_to_hub me/merged: holds files already, such as model.safetensors; give a new one"
    hub.give("whoami", hub.error(401))
    assert push() == "--push_to_hub me/merged: the token is not valid"
    hub.give("whoami", hub.error(500, "Out of order"))
    assert push() == "--push_to_hub me/merged: Out of order"
    hub.give("whoami", errors.OfflineModeIsEnabled("x"))
    assert push() == "--push_to_hub me/merged: HF_HUB_OFFLINE is set"
    hub.give("whoami", errors.HTTPError("no route to host"))
    assert push() == "--push_to_hub me/merged: the hub cannot be reached"
    assert push(repo="merged") == "--push_to_hub merged: give a hub id such as my-name/my-model"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert push() == "--push_to_hub: no token: set HF_TOKEN to one with write access, or run hf auth login"
    assert not (tmp_path / "merged").exists()


def test_an_upload_that_fails_leaves_the_merged_folder_and_says_how_to_go_on(hub, push, tmp_path):
    hub.give("create_repo", hub.error(403))
    assert push() == (
        f"--push_to_hub me/merged: the token has no write access there; {tmp_path / 'merged'} is whole, try again: "
        f"hf upload me/merged {tmp_path / 'merged'} ."
    )
    assert (tmp_path / "merged/config.json").is_file()


def test_bad_combinations_of_flags(run_cli, tmp_path):
    for arguments, line in (
        (["--private"], "--private has no effect without --push_to_hub"),
        (["--limit", "3"], "--limit and --images_dir have no effect without --compare_on"),
        (["--limit", "0", "--compare_on", "x"], "--limit 0: must be at least 1"),
    ):
        code, _, err = run_cli("merge_lora_weights", "x", tmp_path / "merged", *arguments)
        assert code == 2
        assert err.startswith(f"error: {line}")


def test_files_that_cannot_be_scored_or_answered_stop_it_before_the_merge(run_cli, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    records = write_jsonl(tmp_path / "records.jsonl", [row(1, "x", ["no-page.png"])])
    for flag, path, line in (
        ("--predictions", tmp_path / "none.jsonl", "none.jsonl: no such file"),
        ("--compare_on", tmp_path / "none.jsonl", "none.jsonl: no such file"),
        ("--compare_on", records, f"{records}:1: image {tmp_path / 'no-page.png'} does not exist"),
    ):
        code, _, err = run_cli("merge_lora_weights", adapter, tmp_path / "merged", flag, path)
        assert code == 2
        assert line in err.splitlines()[-1]
    assert not (tmp_path / "merged").exists()
