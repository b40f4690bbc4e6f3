"""Answering records: which folders, which batches, and the model at work."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import GenerationConfig, LogitsProcessor

from mistral_ft.data import PromptCollator, RecordDataset, encode_record
from mistral_ft.errors import RecordError, UserError
from mistral_ft.files import read_settings, sha256_file
from mistral_ft.hub import find_model_folder
from mistral_ft.images import ImageFitter, page_size
from mistral_ft.lora import Adapter
from mistral_ft.model import check_model_folder, load_base
from mistral_ft.prompt import PromptEncoder
from mistral_ft.records import Record
from mistral_ft.run_folder import find_run_folder, trained_tokenizer

# Padded tokens of a batch, at most: on the 24B their prefill takes about 15 GiB beside the weights' 45.
MAX_BATCH_TOKENS = 32768


@dataclass(frozen=True)
class ModelFolders:
    """Where a model's parts are.

    Attributes:
        base: hub id or folder of the base or merged model.
        folder: its folder; of a hub id's files, the weights may still be missing there.
        adapter: the adapter on top of it, or None.
    """

    base: str
    folder: Path
    adapter: Adapter | None = None

    @classmethod
    def find(cls, model: str) -> "ModelFolders":
        """An adapter folder and the base it names, or a model folder or hub id by itself.

        Raises:
            UserError: if the folder is neither, or the adapter's tokenizer is not the one it was trained with.
        """
        if not Adapter.is_one(model):
            if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
                raise UserError(f"{model}: holds neither adapter_config.json nor config.json; did its training finish?")
            return cls(model, find_model_folder(model, weights=False))
        adapter = Adapter(model)
        run = find_run_folder(model)
        trained_with = trained_tokenizer(run)
        if not (run / "tokenizer.json").is_file() or sha256_file(run / "tokenizer.json") != trained_with:
            raise UserError(f"{run / 'tokenizer.json'}: is not the one the adapter was trained with (see run.json)")
        return cls(adapter.base_model, adapter.find_base(weights=False), adapter)

    def load_prompt(self) -> tuple[PromptEncoder, ImageFitter]:
        """The encoder and the image fitter: the run's own where there is an adapter, else the model's."""
        check_model_folder(self.folder)
        prompt = find_run_folder(self.adapter.folder) if self.adapter else self.folder
        return PromptEncoder.from_folder(prompt), ImageFitter.from_folder(self.folder)

    def load(self, device: torch.device):
        """The model, the adapter merged into it, ready to generate."""
        folder = find_model_folder(self.base)
        model = load_base(folder, device)
        if self.adapter:
            config = read_settings(folder / "config.json")
            dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "bfloat16")
            self.adapter.merge_into(model, dtype)
        return model.eval()

    def fingerprint(self) -> str:
        """A hash that changes with the weights. Of the base's shards it reads name, size and time, not 48 GB."""
        # A hub id's folder is named by its commit; its shards may not be there yet.
        parts: list[Any] = [self.folder.name]
        if Path(self.base).is_dir():
            shards = sorted(self.folder.glob("*.safetensors"))
            parts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
        parts.append(sha256_file(self.folder / "config.json"))
        if self.adapter:
            parts += [sha256_file(path) for path in sorted(self.adapter.folder.glob("adapter_*"))]
        return hashlib.sha256(json.dumps([str(self.base), parts]).encode()).hexdigest()


def page_lengths(records: Sequence[Record], encoder: PromptEncoder, fitter: ImageFitter) -> list[int]:
    """Tokens of each record's prompt, from the files' headers alone. A page that has none to read counts as nothing."""

    def length(record: Record) -> int:
        try:
            grids = [fitter.grid(*page_size(path)) for path in record.image_paths]
        except ValueError:
            return 0  # the row will get an error when its turn comes
        return len(encode_record(encoder, record, grids, with_answer=False)[0])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(length, records))


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of like length, the longest first, so that what does not fit fails at once.

    A batch has at most `batch_size` rows and, padded, `MAX_BATCH_TOKENS` tokens, but always one row.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = batches and (
            len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > MAX_BATCH_TOKENS
        )
        if not batches or full:
            batches.append([])
        batches[-1].append(index)
    return batches


PREDICTED = ("actual", "confidence", "finish_reason", "error")


@dataclass(frozen=True)
class Answer:
    """What became of one record: a text and how sure the model was of it, or the reason why there is none.

    Attributes:
        log_probs: of the answer's tokens, the end token included.
        finished: whether the model ended the answer, or the limit of tokens did.
    """

    actual: str = ""
    log_probs: tuple[float, ...] = ()
    finished: bool = True
    error: str | None = None

    def write_into(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with the fields in `PREDICTED`; those of an earlier prediction go."""
        kept = {name: value for name, value in record.items() if name not in PREDICTED}
        if self.error is not None:
            return kept | {"error": self.error}
        total, count = sum(self.log_probs), len(self.log_probs)
        # The last digits depend on what else is in the batch; four decimals are plenty.
        sure = {"sum": round(total, 4), "mean": round(total / count, 4), "min": round(min(self.log_probs), 4)}
        return kept | {
            "actual": self.actual,
            "confidence": sure | {"tokens": count},
            "finish_reason": "stop" if self.finished else "length",
        }


class _GreedyLogProbs(LogitsProcessor):
    """Notes the log-probability of each token that greedy decoding takes: that of the likeliest one."""

    def __init__(self):
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        self.steps.append(scores.max(-1).values - scores.logsumexp(-1))
        return scores


class Generator:
    """A loaded model that answers records, greedily.

    Args:
        max_new_tokens: tokens an answer may have.
    """

    def __init__(
        self,
        folders: ModelFolders,
        encoder: PromptEncoder,
        fitter: ImageFitter,
        device: torch.device,
        max_new_tokens: int,
    ):
        self.model = folders.load(device)
        self.encoder, self.fitter, self.device = encoder, fitter, device
        control = encoder.control
        self.settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            bos_token_id=control.bos,
            eos_token_id=control.eos,
            pad_token_id=control.pad,
        )
        self.model.generation_config = self.settings

    def answer(self, records: Sequence[Record], batches: Sequence[Sequence[int]]) -> Iterator[dict[int, Answer]]:
        """Yield the answers of each batch, by row number. The next batch's pages are read meanwhile."""
        examples = _Prompts(RecordDataset(records, self.encoder, self.fitter, with_answers=False))
        loader = DataLoader(
            examples,
            batch_sampler=batches,
            collate_fn=_PromptCollator(self.encoder.control.pad),
            # On a CPU the model needs the cores itself.
            num_workers=4 if self.device.type == "cuda" else 0,
        )
        for rows, (failed, answerable, batch) in zip(batches, loader, strict=True):
            answers = {index: Answer(error=error) for index, error in failed.items()}
            if answerable:
                answers |= dict(zip(answerable, self._generate(batch), strict=True))
            yield {index: answers[index] for index in rows}

    @torch.inference_mode()
    def _generate(self, batch: dict[str, torch.Tensor]) -> list[Answer]:
        batch = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        log_probs = _GreedyLogProbs()
        try:
            output = self.model.generate(**batch, generation_config=self.settings, logits_processor=[log_probs])
        except torch.OutOfMemoryError:
            rows, length = batch["input_ids"].shape
            raise UserError(
                f"the GPU's memory does not hold a batch of {rows} records of up to {length} tokens; lower --batch_size"
            ) from None
        eos = self.encoder.control.eos
        answers = []
        new_ids = output[:, batch["input_ids"].shape[1] :].tolist()
        for ids, probs in zip(new_ids, torch.stack(log_probs.steps, 1).tolist(), strict=True):
            end = ids.index(eos) + 1 if eos in ids else len(ids)
            answers.append(Answer(self.encoder.decode(ids[:end]), tuple(probs[:end]), eos in ids))
        return answers


class _Prompts:
    """Rows as (number, example), or (number, reason) where a page cannot be opened."""

    def __init__(self, dataset: RecordDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any] | str]:
        try:
            return index, self.dataset[index]
        except RecordError as error:
            return index, error.reason


class _PromptCollator:
    """Rows to (reasons by number, numbers, batch of the others)."""

    def __init__(self, pad_id: int):
        self.collate = PromptCollator(pad_id)

    def __call__(self, rows: list[tuple[int, Any]]) -> tuple[dict[int, str], list[int], dict[str, torch.Tensor]]:
        failed = {index: example for index, example in rows if isinstance(example, str)}
        good = [(index, example) for index, example in rows if not isinstance(example, str)]
        batch = self.collate([example for _, example in good]) if good else {}
        return failed, [index for index, _ in good], batch
