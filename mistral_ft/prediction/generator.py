"""Answering records: which folders, which batches, and the model at work."""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoConfig, GenerationConfig

from mistral_ft.data.dataset import PromptCollator, RecordDataset, TrainingCollator, check_images
from mistral_ft.data.image_fitter import ImageFitter
from mistral_ft.data.pages import page_size
from mistral_ft.data.predictions import PREDICTED
from mistral_ft.data.prompt.encoder import PromptEncoder, encode_record
from mistral_ft.data.records import MAX_SEQ_LENGTH, Record
from mistral_ft.data.workers import batches as read
from mistral_ft.data.workers import start_worker, usable_workers
from mistral_ft.errors import RecordError, UserError
from mistral_ft.files import read_settings, sha256_file
from mistral_ft.folders import find_model_folder
from mistral_ft.model.adapter import Adapter
from mistral_ft.model.attention import PACKED
from mistral_ft.model.layers import Seeds
from mistral_ft.model.loading import check_model_folder, is_four_bit, limit_gib, load_base, text_model, weight_bytes
from mistral_ft.prediction.decoding import MAX_PROMPT_TOKENS, GreedyDecoder, KeyValueCache, cut_at, prompt_groups
from mistral_ft.prediction.field_confidence import field_confidences, token_ends, value_spans
from mistral_ft.training.arguments import FOUR_BITS, FP8
from mistral_ft.training.run_folder import find_run_folder, trained_tokenizer

# Records answered at once, at most, where the batch size is chosen. More of them share a sweep over the weights, but
# wait for the longest answer among them.
MOST_ROWS = 32
ROWS_ON_CPU = 8
# Padded tokens of a batch for transformers' generate: on the 24B they take about 15 GiB beside the weights' 45.
MAX_PADDED_TOKENS = 32768
# Tokens of plain text whose logits are there at once: 1 GiB of them with 131,072 ids.
LABELS_AT_ONCE = 2048


@dataclass(frozen=True)
class ModelFolders:
    """Where a model's parts are.

    Attributes:
        base: hub id or folder of the base or merged model.
        folder: its folder; of a hub id's files, the weights may still be missing there.
        adapter: the adapter on top of it, or None.
        rounding: what the text layers' weights are rounded to. The adapter then stays beside them: merged into such
            weights it would be rounded away.
    """

    base: str
    folder: Path
    adapter: Adapter | None = None
    rounding: str | None = None

    @classmethod
    def find(cls, model: str, four_bit: bool | None = None, base_dtype: str | None = None) -> "ModelFolders":
        """An adapter folder and the base it names, or a model folder or hub id by itself.

        Args:
            four_bit: whether to keep the weights in 4 bits.
            base_dtype: "fp8" keeps them in FP8, "bf16" does neither. Where nothing is said against it, the weights are
                those that the adapter was trained on.

        Raises:
            UserError: if the folder is neither, or the adapter's tokenizer is not the one it was trained with.
        """
        if not Adapter.is_one(model):
            if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
                raise UserError(f"{model}: holds neither adapter_config.json nor config.json; did its training finish?")
            return cls._with_weights(model, find_model_folder(model, weights=False), None, four_bit, base_dtype)
        adapter = Adapter(model)
        run = find_run_folder(model)
        trained_with = trained_tokenizer(run)
        if not (run / "tokenizer.json").is_file() or sha256_file(run / "tokenizer.json") != trained_with:
            raise UserError(f"{run / 'tokenizer.json'}: is not the one the adapter was trained with (see run.json)")
        return cls._with_weights(adapter.base_model, adapter.find_base(weights=False), adapter, four_bit, base_dtype)

    @classmethod
    def _with_weights(
        cls, base: str, folder: Path, adapter: Adapter | None, four_bit: bool | None, base_dtype: str | None
    ) -> "ModelFolders":
        is_copy = is_four_bit(check_model_folder(folder))
        if is_copy and (four_bit is False or base_dtype):
            flag = f"--base_dtype {base_dtype}" if base_dtype else "--no-load_in_4bit"
            raise UserError(f"{flag}: {folder} holds 4-bit weights only; name the bf16 model they are from")
        if is_copy or four_bit:
            return cls(base, folder, adapter, FOUR_BITS)
        if base_dtype is not None:
            return cls(base, folder, adapter, FP8 if base_dtype == "fp8" else None)
        trained = adapter and adapter.rounding
        return cls(base, folder, adapter, None if four_bit is False and trained == FOUR_BITS else trained)

    def load_prompt(self) -> tuple[PromptEncoder, ImageFitter | None]:
        """The encoder and the image fitter: the run's own where there is an adapter, else the model's.

        The fitter is None for a model that reads text only.
        """
        prompt = find_run_folder(self.adapter.folder) if self.adapter else self.folder
        return PromptEncoder.from_folder(prompt), ImageFitter.from_folder(self.folder)

    def load(self, device: torch.device):
        """The model with the adapter, ready to generate: merged into it, or beside rounded weights."""
        folder = find_model_folder(self.base)
        model = load_base(folder, device, rounding=self.rounding)
        if self.adapter and self.rounding:
            wrapped = self.adapter.put_on(model)
            Seeds(wrapped)  # runs the adapter in the base's dtype, as in training
            model = wrapped.get_base_model()
        elif self.adapter:
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
        parts += [self.rounding] if self.rounding else []
        return hashlib.sha256(json.dumps([str(self.base), parts]).encode()).hexdigest()


def page_lengths(records: Sequence[Record], encoder: PromptEncoder, fitter: ImageFitter | None) -> list[int]:
    """Tokens of each record's prompt, from the files' headers alone. A page that has none to read counts as nothing.

    Raises:
        UserError: naming the first record that shows an image to a model that reads text only, or that the model's
            prompt has no place for.
    """
    check_images(records, fitter)

    def length(record: Record) -> int:
        try:
            grids = [fitter.grid(*page_size(path, fitter)) for path in record.image_paths]
        except ValueError:
            return 0  # the row will get an error when its turn comes
        try:
            return len(encode_record(encoder, record, grids, with_answer=False)[0])
        except ValueError as error:
            raise record.error(str(error)) from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(length, records))


def plan_batches(lengths: Sequence[int], batch_size: int, most_tokens: int) -> list[list[int]]:
    """Row numbers in batches of like length, the longest first, so that what does not fit fails at once.

    A batch has at most `batch_size` rows and, if all were as long as its longest, `most_tokens` tokens, but always one
    row.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = batches and (
            len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > most_tokens
        )
        if not batches or full:
            batches.append([])
        batches[-1].append(index)
    return batches


def plan(
    lengths: Sequence[int],
    folders: ModelFolders,
    device: torch.device,
    max_new_tokens: int,
    batch_size: int | None = None,
    num_beams: int | None = None,
    texts: Set[int] = frozenset(),
) -> list[list[int]]:
    """Batches for these prompts.

    Args:
        lengths: tokens of each prompt.
        folders: of the model.
        batch_size: rows of a batch; None: as many as the GPU has room for, up to `MOST_ROWS`.
        num_beams: beams of transformers' generate, where that is used.
        texts: rows of plain text, which are read and not answered: they have batches of their own.
    """
    if texts:
        asked = [row for row in range(len(lengths)) if row not in texts]
        read = sorted(texts)
        answered = asked and plan(
            [lengths[row] for row in asked], folders, device, max_new_tokens, batch_size, num_beams
        )
        reading = plan_batches([lengths[row] for row in read], batch_size or MOST_ROWS, MAX_PROMPT_TOKENS)
        return [[rows[k] for k in batch] for rows, batches in ((asked, answered), (read, reading)) for batch in batches]
    whole = [length + max_new_tokens for length in lengths]
    if num_beams is not None:
        return plan_batches(whole, batch_size or ROWS_ON_CPU, MAX_PADDED_TOKENS // num_beams)
    if device.type != "cuda" or batch_size is not None:
        return plan_batches(whole, batch_size or ROWS_ON_CPU, sys.maxsize)
    return plan_batches(whole, MOST_ROWS, cache_tokens(folders, device, max(lengths)))


def cache_tokens(folders: ModelFolders, device: torch.device, longest: int) -> int:
    """Tokens, of prompts and answers, whose keys and values the GPU has room for beside the weights.

    Args:
        folders: of the model; only its config.json is read.
        longest: tokens of the longest prompt.
    """
    text = AutoConfig.from_pretrained(folders.folder).get_text_config()
    free = limit_gib(device) * 2**30 - weight_bytes(folders.folder, folders.rounding)
    return tokens_that_fit(free, text, longest)


def tokens_that_fit(free: float, text: Any, longest: int) -> int:
    """Tokens whose keys and values go into `free` bytes of GPU memory beside the prompts at work.

    Args:
        text: the text model's config.
        longest: tokens of the longest prompt.
    """
    # Prompts at work: five tensors as wide as the MLP, eight as wide as the hidden state; 3 GiB for the rest.
    width = 2 * (5 * text.intermediate_size + 8 * text.hidden_size)
    at_work = max(longest, MAX_PROMPT_TOKENS) * width + 3 * 2**30
    return max(0, int(free - at_work)) // KeyValueCache.bytes_per_token(text, torch.bfloat16)


@dataclass(frozen=True)
class Answer:
    """What became of one record: a text and how sure the model was of it, or the reason why there is none.

    Attributes:
        log_probs: of the answer's tokens, the end token included; none of an answer that was cut off while thinking.
        fields: of an answer that is a JSON object, the confidence of each top-level value.
        finished: whether the model ended the answer, or the limit of tokens did.
        thinking: what the model thought before the answer, for those that do.
    """

    actual: str = ""
    log_probs: tuple[float, ...] = ()
    fields: dict[str, dict[str, float]] = field(default_factory=dict)
    finished: bool = True
    thinking: str = ""
    error: str | None = None

    def write_into(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with the fields in `PREDICTED`; those of an earlier prediction go."""
        kept = {name: value for name, value in record.items() if name not in PREDICTED}
        if self.error is not None:
            return kept | {"error": self.error}
        found: dict[str, Any] = {"thinking": self.thinking} if self.thinking else {}
        found["actual"] = self.actual
        if self.log_probs:
            total, count = sum(self.log_probs), len(self.log_probs)
            # The last digits depend on what else is in the batch; four decimals are plenty.
            sure = {"sum": round(total, 4), "mean": round(total / count, 4), "min": round(min(self.log_probs), 4)}
            found["confidence"] = sure | {"tokens": count} | ({"fields": self.fields} if self.fields else {})
        return kept | found | {"finish_reason": "stop" if self.finished else "length"}


@dataclass(frozen=True)
class Reading:
    """How well the model predicts a plain text: negative log-likelihood in nats, summed over so many tokens."""

    nll: float
    tokens: int

    def write_into(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with `nll` and `tokens`; what an earlier prediction wrote goes."""
        kept = {name: value for name, value in record.items() if name not in PREDICTED}
        return kept | {"nll": round(self.nll, 4), "tokens": self.tokens}


class Generator:
    """A loaded model that answers records, and reads plain text.

    Args:
        max_new_tokens: tokens an answer may have.
        search: settings of transformers' `generate` other than greedy decoding, such as {"num_beams": 4} or
            {"do_sample": True, "temperature": 0.7}; empty for greedy decoding, which is this toolkit's own.
        seed: of samples. Each batch starts from it anew, so that a run that is continued draws the same.
        max_seq_length: tokens of the pieces that longer plain text is read in.
    """

    def __init__(
        self,
        folders: ModelFolders,
        encoder: PromptEncoder,
        fitter: ImageFitter | None,
        device: torch.device,
        max_new_tokens: int,
        search: dict[str, Any] | None = None,
        seed: int = 0,
        max_seq_length: int = MAX_SEQ_LENGTH,
    ):
        self.model = folders.load(device)
        self.max_seq_length = max_seq_length
        self.encoder, self.fitter, self.device = encoder, fitter, device
        self.max_new_tokens, self.seed = max_new_tokens, seed
        control = encoder.control
        self.search = search and GenerationConfig(
            max_new_tokens=max_new_tokens,
            bos_token_id=control.bos,
            eos_token_id=control.eos,
            pad_token_id=control.pad,
            return_dict_in_generate=True,
            output_scores=True,
            **search,
        )
        if self.search:
            self.model.generation_config = self.search
            self.collate = PromptCollator(control.pad)
        else:
            self.decoder = GreedyDecoder(self.model, control.eos)
            self.collate = GroupCollator(control.pad)

    def answer(
        self, records: Sequence[Record], batches: Sequence[Sequence[int]]
    ) -> Iterator[dict[int, Answer | Reading]]:
        """Yield the answers of each batch, by row number. The next pages are read meanwhile."""
        workers = usable_workers(page_workers(self.device))
        pages = DataLoader(
            _Prompts(RecordDataset(records, self.encoder, self.fitter, with_answers=False)),
            batch_size=None,  # row by row, so that all workers read for the first batch
            sampler=[index for batch in batches for index in batch],
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=8 if workers else None,
            worker_init_fn=start_worker,
        )
        rows = read(pages)
        for batch in batches:
            found = dict(itertools.islice(rows, len(batch)))
            good = {index: example for index, example in found.items() if not isinstance(example, str)}
            answers = {index: Answer(error=reason) for index, reason in found.items() if index not in good}
            if good and records[batch[0]].text is not None:
                answers |= dict(zip(good, self._read([records[index].text for index in good]), strict=True))
            elif good:
                answers |= dict(zip(good, self._generate(self.collate(list(good.values()))), strict=True))
            yield {index: answers[index] for index in batch}

    @torch.inference_mode()
    def _read(self, texts: Sequence[str]) -> list[Reading]:
        """How well the model predicts each text, every token of it given those before it in its piece."""
        pieces = [
            (row, ids) for row, text in enumerate(texts) for ids in self.encoder.pieces(text, self.max_seq_length)
        ]
        config, nll = text_model(self.model).config, [0.0] * len(texts)
        attention, config._attn_implementation = config._attn_implementation, PACKED
        try:
            for group in prompt_groups([len(ids) + 1 for _, ids in pieces]):
                rows = torch.tensor([pieces[k][0] for k in group]).repeat_interleave(
                    torch.tensor([len(pieces[k][1]) for k in group])
                )
                for row, loss in zip(rows.tolist(), self._losses([pieces[k][1] for k in group]), strict=True):
                    nll[row] += loss
        except torch.OutOfMemoryError:
            raise UserError(
                "the GPU's memory does not hold plain text of this length; lower --max_seq_length"
            ) from None
        finally:
            config._attn_implementation = attention
        tokens = [sum(len(ids) for row, ids in pieces if row == wanted) for wanted in range(len(texts))]
        return [Reading(*pair) for pair in zip(nll, tokens, strict=True)]

    def _losses(self, pieces: Sequence[Sequence[int]]) -> list[float]:
        """Cross entropy of each id of the pieces, which are read side by side, in nats."""
        examples = [dict(zip(("input_ids", "labels"), self.encoder.frame(ids), strict=True)) for ids in pieces]
        batch = TrainingCollator(self.encoder.control.pad)([[e | {"image_sizes": []} for e in examples]])
        positions, labels = batch.pop("label_positions"), batch.pop("labels")[0]
        del batch["num_tokens"]
        inputs = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state[0, positions.to(self.device)]
        targets = labels[positions + 1].to(self.device)
        found = [
            F.cross_entropy(self.model.lm_head(some).float(), wanted, reduction="none")
            for some, wanted in zip(hidden.split(LABELS_AT_ONCE), targets.split(LABELS_AT_ONCE), strict=True)
        ]
        return torch.cat(found).tolist()

    def _generate(self, batch: Any) -> list[Answer]:
        try:
            if self.search:
                new_ids, log_probs = self._generate_by_search(batch)
            else:
                new_ids, log_probs = self.decoder.decode(batch, self.max_new_tokens)
        except torch.OutOfMemoryError:
            raise UserError("the GPU's memory does not hold such a batch of records; lower --batch_size") from None
        return [self._answer(ids, probs) for ids, probs in zip(new_ids, log_probs, strict=True)]

    @torch.inference_mode()
    def _generate_by_search(self, batch: dict[str, Any]) -> tuple[list[list[int]], list[list[float]]]:
        """New tokens and their log-probabilities, by transformers' generate."""
        torch.manual_seed(self.seed)
        ids, core = batch["input_ids"].to(self.device), self.model.model
        embeds = self.model.get_input_embeddings()(ids)
        if "pixel_values" in batch:
            # generate repeats its inputs for each beam, row by row, and patches are not in rows.
            pages = core.get_image_features(batch["pixel_values"].to(self.device), batch["image_sizes"]).pooler_output
            places = (ids == core.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(places, torch.cat(pages).to(embeds.dtype))
        output = self.model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"].to(self.device))
        beams = getattr(output, "beam_indices", None)
        # Scores of beams are log-probabilities already.
        scores = self.model.compute_transition_scores(
            output.sequences, output.scores, beams, normalize_logits=beams is None
        )
        return cut_at(self.encoder.control.eos, output.sequences.tolist(), scores.tolist())

    def _answer(self, ids: list[int], log_probs: list[float]) -> Answer:
        finished, thinking = ids[-1] == self.encoder.control.eos, self.encoder.decode_thinking(ids)
        said = [not is_thought for is_thought in self.encoder.thought(ids)]
        ids, log_probs = list(itertools.compress(ids, said)), list(itertools.compress(log_probs, said))
        text, fields = self.encoder.decode(ids), {}
        if value_spans(text):
            ends = token_ends([self.encoder.decode(ids[: count + 1]) for count in range(len(ids))])
            fields = field_confidences(text, ends, log_probs)
        return Answer(text, tuple(log_probs), fields, finished, thinking)


def page_workers(device: torch.device) -> int:
    """How many processes read pages; on a CPU the model needs the cores itself."""
    return min(8, os.cpu_count() or 1) if device.type == "cuda" else 0


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


def _as_it_is(row: tuple[int, Any]) -> tuple[int, Any]:
    """DataLoader would turn every number of a row into a tensor."""
    return row


class GroupCollator:
    """Examples to groups of prompts laid end to end, as `GreedyDecoder` takes them."""

    def __init__(self, pad_id: int):
        self.collate = TrainingCollator(pad_id)

    def __call__(self, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        lengths = [len(example["input_ids"]) for example in examples]
        return [self.collate([[examples[row] for row in group]]) for group in prompt_groups(lengths)]
