"""Base + adapter, unmerged as peft runs them, against the merged folder: the same records, answered or read by both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mistral_ft.data.collators import PromptCollator
from mistral_ft.data.dataset import RecordDataset
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import Record
from mistral_ft.model.adapter import Adapter
from mistral_ft.model.loading import load_base
from mistral_ft.progress import Progress

MAX_NEW_TOKENS = 300  # as predict's default
# Plain text is read in pieces of so many tokens: their logits are there at once, 1 GiB with 131,072 ids.
MAX_TEXT_TOKENS = 2048


@dataclass
class MergeComparison:
    """What both models answered, and how well they predict plain text.

    Attributes:
        answers: of each record that asks something, in their order: (unmerged, merged).
        texts: how many plain texts there are, and tokens in them.
        nll: of those tokens, summed, in nats: (unmerged, merged).
        logit_difference: the largest between two logits of the same token after the same prompt and answer so far.
        logit_range: smallest and largest logit that the unmerged model gave.
    """

    answers: list[tuple[str, str]]
    texts: tuple[int, int]
    nll: tuple[float, float]
    logit_difference: float
    logit_range: tuple[float, float]

    def print(self, name: str) -> None:
        """Say how many answers of the file `name` differ, and which; of plain texts the perplexities."""
        count, tokens = self.texts
        if count:
            before, after = (math.exp(nll / tokens) for nll in self.nll)
            print(
                f"Compared on {count} plain texts of {name}, {tokens:,} tokens: perplexity {before:.6g} with the "
                f"adapter unmerged, {after:.6g} merged"
            )
        if not self.answers:
            return
        differing = [(number, *pair) for number, pair in enumerate(self.answers, 1) if pair[0] != pair[1]]
        print(
            f"Compared on {len(self.answers)} records of {name}: {len(differing)} answers differ between the adapter "
            f"unmerged and merged; largest logit difference {self.logit_difference:.4g}, of logits from "
            f"{self.logit_range[0]:.4g} to {self.logit_range[1]:.4g}"
        )
        for number, unmerged, merged in differing:
            same = _equal_length(unmerged, merged)
            ends = [repr(answer[same : same + 40]) for answer in (unmerged, merged)]
            print(f"record {number}: after {same} equal characters, unmerged {ends[0]}, merged {ends[1]}")


def _equal_length(first: Sequence, second: Sequence) -> int:
    """How many items two sequences have in common at their start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


class MergeComparer:
    """Answers records with an adapter unmerged, and with the merged model; plain text is read.

    Raises:
        UserError: if the image of a record cannot be opened, or the model reads text only.
    """

    def __init__(self, records: Sequence[Record], base: Path, adapter: Adapter):
        self.base, self.adapter = base, adapter
        processor = Processor.from_folder(base)
        self.encoder = processor.encoder
        processor.check_images(records)
        texts = [record.text for record in records if record.text is not None]
        self.text_count = len(texts)
        self.pieces = [piece for text in texts for piece in self.encoder.pieces(text, MAX_TEXT_TOKENS)]
        asked = [record for record in records if record.text is None]
        self.dataset = RecordDataset(asked, processor, with_answers=False)
        for index in range(len(asked)):
            self.dataset[index]  # opens its pages

    def run(self, merged: Path, device: torch.device) -> MergeComparison:
        """Answer with one model after the other, so that memory holds one at a time.

        Raises:
            UserError: if peft does not load the adapter as it is in its file.
        """
        unmerged = self.adapter.put_on(load_base(self.base, device)).eval()
        first, nll = self._answer(unmerged, device, "answering, unmerged"), self._read(unmerged, device)
        del unmerged
        model = load_base(merged, device).eval()
        second, merged_nll = self._answer(model, device, "answering, merged"), self._read(model, device)

        difference, low, high = 0.0, float("inf"), float("-inf")
        for (ids, logits), (other_ids, other_logits) in zip(first, second, strict=True):
            # Once one token differs, the prompts of the next ones do.
            steps = min(_equal_length(ids, other_ids) + 1, len(ids), len(other_ids))
            difference = max(difference, (logits[:steps] - other_logits[:steps]).abs().max().item())
            low, high = min(low, logits.min().item()), max(high, logits.max().item())

        def decode(ids: list[int]) -> str:
            return self.encoder.decode_thinking(ids) + self.encoder.decode(ids)

        answers = [(decode(ids), decode(other_ids)) for (ids, _), (other_ids, _) in zip(first, second, strict=True)]
        texts = self.text_count, sum(map(len, self.pieces))
        return MergeComparison(answers, texts, (nll, merged_nll), difference, (low, high))

    @torch.inference_mode()
    def _read(self, model: nn.Module, device: torch.device) -> float:
        """Negative log-likelihood of all plain texts, in nats."""
        nll = 0.0
        for piece in self.pieces:
            ids = torch.tensor([self.encoder.frame(piece)[0]], device=device)
            logits = model(input_ids=ids).logits[0, :-1].float()
            nll += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        return nll

    @torch.inference_mode()
    def _answer(self, model: nn.Module, device: torch.device, what: str) -> list[tuple[list[int], torch.Tensor]]:
        """The ids of each answer, greedily, and the logits that they were taken from, (tokens, vocabulary) in fp32."""
        control = self.encoder.control
        collate = PromptCollator(control.pad)
        progress = Progress(what, len(self.dataset), "row")
        answers = []
        for index in range(len(self.dataset)):
            batch = collate([self.dataset[index]])
            batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
            generate: Any = model.generate
            output = generate(
                **batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, bos_token_id=control.bos,
                eos_token_id=control.eos, pad_token_id=control.pad, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            ids = output.sequences[0, batch["input_ids"].shape[1] :].tolist()
            answers.append((ids, torch.cat(output.logits).float().cpu()))
            progress.update()
        progress.close()
        return answers
