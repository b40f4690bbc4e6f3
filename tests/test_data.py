"""Batches: literal padding, mixed rows, images in the order of their records; pages checked ahead of training."""

import numpy as np
import pytest
import torch

from mistral_ft.data import Collator, RecordDataset, count_tokens
from mistral_ft.errors import RecordError, UserError
from mistral_ft.images import ImageFitter
from mistral_ft.prompt import PromptEncoder
from mistral_ft.records import read_records
from tests.conftest import TINY, read_rows, row, write_jsonl

PAD = -8  # unlike any id or label, so that a mix-up shows


def example(ids, labels, *sizes):
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": [np.full((3, h, w), i + 1, np.float32) for i, (h, w) in enumerate(sizes)],
    }


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder.from_folder(TINY)


@pytest.fixture(scope="module")
def fitter():
    return ImageFitter.from_folder(TINY)


def test_right_padding_is_literal():
    batch = Collator(PAD)([example([1, 5, 6], [-100, 5, 6]), example([1, 7], [-100, 7])])
    assert batch["input_ids"].tolist() == [[1, 5, 6], [1, 7, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 6], [-100, 7, -100]]
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


def test_left_padding_is_literal():
    batch = Collator(PAD, "left")([example([1, 5, 6], [-100, 5, 6]), example([1, 7], [-100, 7])])
    assert batch["input_ids"].tolist() == [[1, 5, 6], [PAD, 1, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 5, 6], [-100, -100, 7]]


def test_images_of_several_sizes_are_padded_with_zeros_in_the_order_of_their_records():
    batch = Collator(PAD)([example([1], [1], (28, 56), (56, 28)), example([1], [1]), example([1], [1], (28, 28))])
    assert batch["image_sizes"].tolist() == [[28, 56], [56, 28], [28, 28]]
    assert batch["pixel_values"].shape == (3, 3, 56, 56)
    assert [page[0, 0, 0].item() for page in batch["pixel_values"]] == [1, 2, 1]
    assert batch["pixel_values"][0, :, 28:].abs().sum() == 0
    assert batch["pixel_values"][1, :, :, 28:].abs().sum() == 0
    assert batch["pixel_values"].dtype == torch.float32


def test_examples_of_mixed_rows(pages, encoder, fitter):
    dataset = RecordDataset(read_records([pages / "train.jsonl"]), encoder, fitter)
    two, none = dataset[5], dataset[6]
    assert [page.shape for page in two["pixel_values"]] == [(3, 56, 84), (3, 56, 84)]
    assert two["input_ids"].count(10) == 12
    assert none["pixel_values"] == []
    assert none["input_ids"].count(10) == 0
    assert encoder.decode([label for label in two["labels"] if label != -100]) == "Two pages"


def test_without_answers_nothing_is_labelled(pages, encoder, fitter):
    dataset = RecordDataset(read_records([pages / "train.jsonl"]), encoder, fitter, with_answers=False)
    assert set(dataset[0]["labels"]) == {-100}
    assert dataset[0]["input_ids"][-1] == 4  # [/INST]


def test_every_token_is_counted(pages, encoder, fitter):
    records = read_records([pages / "train.jsonl"])
    dataset = RecordDataset(records, encoder, fitter)
    lengths = count_tokens(records, encoder, fitter, 1000)
    assert lengths == [len(dataset[i]["input_ids"]) for i in range(len(dataset))]


def test_bad_pages_are_named_by_line_before_training(pages, encoder, fitter):
    data = (pages / "3.png").read_bytes()
    (pages / "3.png").write_bytes(data[: len(data) // 2])
    (pages / "7.png").unlink()
    records = read_records([pages / "train.jsonl"])
    with pytest.raises(UserError) as error:
        count_tokens(records, encoder, fitter, 1000)
    assert f"{pages / 'train.jsonl'}:4: image {pages / '3.png'} cannot be opened" in str(error.value)
    assert str(error.value).endswith("(and 1 more bad rows, on lines 8)")
    with pytest.raises(RecordError, match=r"train.jsonl:8: image .*7.png does not exist"):
        RecordDataset(records, encoder, fitter)[7]


def test_long_records_are_named_and_never_cut(pages, encoder, fitter):
    rows = read_rows(pages / "train.jsonl")
    rows[2] = row(2, "x " * 100, ["2.png"])
    records = read_records([write_jsonl(pages / "train.jsonl", rows)])
    with pytest.raises(UserError, match=r"train.jsonl:3: 1\d\d tokens \(8 of them for 1 images\) are more than --m"):
        count_tokens(records, encoder, fitter, 100)
