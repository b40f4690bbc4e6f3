"""The pre-training of the embedded base: what it shows, what it asks, and that it computes what transformers does."""

import random

import pytest
import torch
from transformers import Mistral3ForConditionalGeneration

from models.pretraining import pages
from models.pretraining.pretrain import PAD, STRIP, Reader, Writer
from models.tiny.build import find_tekken
from tests.conftest import TINY


@pytest.fixture(scope="module")
def reader():
    return Reader(Mistral3ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)).eval()


@pytest.fixture(scope="module")
def writer():
    return Writer(TINY, find_tekken(), seed=1, repeat=0.5)


@torch.no_grad()
def test_cells_are_those_of_transformers(reader):
    pixels = torch.randn(2, 3, 112, 84, generator=torch.Generator().manual_seed(0))
    ours = reader.features(pixels)
    theirs = reader.model.model.get_image_features(pixels, torch.tensor([[112, 84]] * 2)).pooler_output
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_a_turn_asks_for_a_part_and_is_answered_line_by_line(writer):
    page = pages.lay_out_letter((280, 112), "", "Decree 41 on Bridge Tolls and Salt", "", random.Random(3))
    lines = [line.text for line in page.parts["heading"]]
    assert " ".join(lines) == "Decree 41 on Bridge Tolls and Salt"
    answers, tokens, characters = writer.read(page, STRIP)
    assert writer.tokenizer.decode(answers["heading"]) == " ".join(f"{line} |" for line in lines)
    shown = {writer.tokenizer.decode([token]).strip() for token in tokens[tokens != PAD].tolist()}
    assert shown <= {writer.tokenizer.decode([token]).strip() for token in answers["heading"]}
    assert characters.max() > 0


def test_labels_are_the_ids_that_follow_and_questions_are_not_learned(writer):
    batch = writer.batch(STRIP, 16)
    learned = batch["labels"][:, :-1] >= 0
    assert (batch["labels"][:, :-1] == batch["ids"][:, 1:])[learned].all()
    for (part, answer), ids, labels in zip(batch["asked"], batch["ids"], batch["labels"], strict=True):
        assert f"Read the {part}." in writer.tokenizer.decode(ids.tolist())
        assert answer in writer.tokenizer.decode([token for token in labels.tolist() if token >= 0])


@torch.no_grad()
def test_the_shipped_weights_read_pages_that_nobody_has_drawn_before(reader):
    writer = Writer(TINY, find_tekken(), seed=20261121)
    batch = writer.batch(STRIP, 24)
    read = [writer.tokenizer.decode(ids) for ids in reader.transcribe(batch, writer.encode_often)]
    assert sum(text == printed for (_, printed), text in zip(batch["asked"], read, strict=True)) >= 21


def test_reserved_texts_are_kept_for_test_pages():
    rng = random.Random(0)
    assert all(pages.reserved(pages.draw_free(pages.make_total, rng, test=True)) for _ in range(50))
    assert not any(pages.reserved(pages.draw_free(pages.make_total, rng)) for _ in range(50))
