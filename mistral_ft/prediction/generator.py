"""Answering records, and reading plain text: the loaded model at work."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import GenerationConfig

from mistral_ft.data.collators import GroupCollator, PromptCollator, TrainingCollator
from mistral_ft.data.dataset import Example, RecordDataset
from mistral_ft.data.packing import prompt_groups
from mistral_ft.data.predictions import PREDICTED
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import MAX_SEQ_LENGTH, Record
from mistral_ft.data.workers import batches as read
from mistral_ft.data.workers import start_worker, usable_workers
from mistral_ft.errors import RecordError, UserError
from mistral_ft.model.attention import PACKED, attention
from mistral_ft.model.loading import text_model
from mistral_ft.prediction.decoding import GreedyDecoder, cut_at
from mistral_ft.prediction.field_confidence import field_confidences, token_ends, value_spans
from mistral_ft.prediction.losses import label_chunks
from mistral_ft.prediction.trained_model import ModelFolders


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
        processor: Processor,
        device: torch.device,
        max_new_tokens: int,
        search: dict[str, Any] | None = None,
        seed: int = 0,
        max_seq_length: int = MAX_SEQ_LENGTH,
    ):
        self.model = folders.load(device)
        self.max_seq_length = max_seq_length
        self.processor, self.encoder, self.device = processor, processor.encoder, device
        self.max_new_tokens, self.seed = max_new_tokens, seed
        control = self.encoder.control
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
            self.collate: Any = PromptCollator(control.pad)
        else:
            self.decoder = GreedyDecoder(self.model, control.eos)
            self.collate = GroupCollator(control.pad)

    def answer(
        self, records: Sequence[Record], batches: Sequence[Sequence[int]]
    ) -> Iterator[dict[int, Answer | Reading]]:
        """Yield the answers of each batch, by row number. The next pages are read meanwhile."""
        workers = usable_workers(page_workers(self.device))
        pages: DataLoader[Any] = DataLoader(
            _Prompts(RecordDataset(records, self.processor, with_answers=False)),
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
        nll = [0.0] * len(texts)
        try:
            with attention(text_model(self.model).config, PACKED):
                for group in prompt_groups([len(ids) + 1 for _, ids in pieces]):
                    rows = [pieces[k][0] for k in group for _ in pieces[k][1]]
                    for row, loss in zip(rows, self._losses([pieces[k][1] for k in group]), strict=True):
                        nll[row] += loss
        except torch.OutOfMemoryError:
            raise UserError(
                "the GPU's memory does not hold plain text of this length; lower --max_seq_length"
            ) from None
        tokens = [sum(len(ids) for row, ids in pieces if row == wanted) for wanted in range(len(texts))]
        return [Reading(*pair) for pair in zip(nll, tokens, strict=True)]

    def _losses(self, pieces: Sequence[Sequence[int]]) -> list[float]:
        """Cross entropy of each id of the pieces, which are read side by side, in nats."""
        batch = TrainingCollator(self.encoder.control.pad)([[Example(*self.encoder.frame(ids)) for ids in pieces]])
        found = [
            F.cross_entropy(self.model.lm_head(hidden).float(), labels, reduction="none")
            for hidden, labels in label_chunks(self.model, batch.to(self.device))
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


class _Prompts(Dataset[Any]):
    """Rows as (number, example), or (number, reason) where a page cannot be opened."""

    def __init__(self, dataset: RecordDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Example | str]:
        try:
            return index, self.dataset[index]
        except RecordError as error:
            return index, error.reason


def _as_it_is(row: Any) -> Any:
    """DataLoader would turn every number of a row into a tensor."""
    return row
