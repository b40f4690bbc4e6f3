"""Batches: literal padding, mixed rows, images in the order of their records; pages checked ahead of training."""

import numpy as np
import pytest
import torch

from mistral_ft.data.collators import PackedDataset, PromptCollator, TrainingCollator
from mistral_ft.data.dataset import Example, RecordDataset, measure_records
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import read_records
from mistral_ft.errors import RecordError, UserError
from tests.conftest import TINY, read_rows, row, write_jsonl

PAD = -8  # unlike any id or label, so that a mix-up shows


def example(ids, labels, *sizes):
    """Each image's patches hold its number, from 1."""
    patches = [np.full((h * w // 196, 588), i + 1, np.float32) for i, (h, w) in enumerate(sizes)]
    return Example(ids, labels, patches, sizes)


@pytest.fixture(scope="module")
def processor():
    return Processor.from_folder(TINY)


def values(batch):
    """What a batch holds, tensors as lists, without what it does not have."""
    fields = (batch if isinstance(batch, dict) else vars(batch)).items()
    return {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in fields if x is not None}


ONE, TWO = example([1, 5, 6], [-100, 5, 6]), example([1, 7], [-100, 7])


def test_records_are_laid_end_to_end():
    expected = {
        "input_ids": [[1, 5, 6, 1, 7]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "labels": [[-100, 5, 6, -100, 7]],
        "label_positions": [0, 1, 3],
        "cu_seq_lens": [0, 3, 5],
        "max_length": 3,
        "num_tokens": 5,
    }
    assert values(TrainingCollator(PAD)([[ONE, TWO]])) == expected
    assert values(TrainingCollator(PAD)([[ONE], [TWO]])) == expected


def test_a_packed_sequence_is_filled_up_by_a_record_of_its_own():
    assert values(TrainingCollator(PAD, length=8, max_records=4)([[ONE, TWO]])) == {
        "input_ids": [[1, 5, 6, 1, 7, PAD, PAD, PAD]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2]],
        "labels": [[-100, 5, 6, -100, 7, -100, -100, -100]],
        "label_positions": [0, 1, 3],
        "cu_seq_lens": [0, 3, 5, 8, 8],
        "max_length": 8,
        "num_tokens": 5,
    }


def test_a_model_is_called_without_labels():
    batch = TrainingCollator(PAD)([[ONE, TWO]])
    assert list(batch.model_inputs()) == ["input_ids", "position_ids", "cu_seq_lens", "max_length"]
    shown = TrainingCollator(PAD)([[example([1], [1], (28, 56))]]).to(torch.device("meta"))
    assert list(shown.model_inputs())[-2:] == ["pixel_values", "image_sizes"]
    assert (shown.pixel_values.device.type, shown.image_sizes) == ("meta", [(28, 56)])


def test_prompts_are_padded_on_the_left():
    assert values(PromptCollator(PAD)([ONE, TWO])) == {
        "input_ids": [[1, 5, 6], [PAD, 1, 7]],
        "attention_mask": [[1, 1, 1], [0, 1, 1]],
    }


@pytest.mark.parametrize("collate", [PromptCollator(PAD), lambda examples: vars(TrainingCollator(PAD)([examples]))])
def test_images_stand_in_the_order_of_their_records(collate):
    batch = collate([example([1], [1], (28, 56), (56, 28)), example([1], [1]), example([1], [1], (28, 28))])
    assert batch["image_sizes"] == [(28, 56), (56, 28), (28, 28)]
    assert batch["pixel_values"][:, 0].tolist() == [1] * 8 + [2] * 8 + [1] * 4
    assert batch["pixel_values"].dtype == torch.float32


def test_a_pack_is_the_list_of_its_examples(pages, processor):
    dataset = RecordDataset(read_records([pages / "train.jsonl"]), processor)
    packed = PackedDataset(dataset, [[6, 0], [5]])
    assert len(packed) == 2
    assert [e.input_ids for e in packed[0]] == [dataset[6].input_ids, dataset[0].input_ids]


def test_examples_of_mixed_rows(pages, processor):
    dataset = RecordDataset(read_records([pages / "train.jsonl"]), processor)
    two, none = dataset[5], dataset[6]
    assert [page.shape for page in two.pixel_values] == [(24, 588), (24, 588)]
    assert two.image_sizes == [(56, 84), (56, 84)]
    assert two.input_ids.count(10) == 12
    assert none.pixel_values == []
    assert none.input_ids.count(10) == 0
    assert processor.encoder.decode([label for label in two.labels if label != -100]) == "Two pages"


def test_without_answers_nothing_is_labelled(pages, processor):
    dataset = RecordDataset(read_records([pages / "train.jsonl"]), processor, with_answers=False)
    assert set(dataset[0].labels) == {-100}
    assert dataset[0].input_ids[-1] == 4  # [/INST]


def test_tokens_patches_and_labels_are_counted(pages, processor):
    records = read_records([pages / "train.jsonl"])
    dataset = RecordDataset(records, processor)
    sizes = measure_records(records, processor, 1000)
    for number, size in enumerate(sizes):
        batch = TrainingCollator(PAD)([[dataset[number]]])
        assert size.tokens == batch.num_tokens == batch.input_ids.shape[1]
        assert size.labels == len(batch.label_positions)
        assert size.patches == (0 if batch.pixel_values is None else len(batch.pixel_values))
    assert [size.patches for size in sizes[:7]] == [32, 24, 24, 32, 24, 48, 0]


def test_bad_pages_are_named_by_line_before_training(pages, processor):
    data = (pages / "3.png").read_bytes()
    (pages / "3.png").write_bytes(data[: len(data) // 2])
    (pages / "7.png").unlink()
    records = read_records([pages / "train.jsonl"])
    with pytest.raises(UserError) as error:
        measure_records(records, processor, 1000)
    assert f"{pages / 'train.jsonl'}:4: image {pages / '3.png'} cannot be opened" in str(error.value)
    assert str(error.value).endswith("(and 1 more bad rows, on lines 8)")
    with pytest.raises(RecordError, match=r"train.jsonl:8: image .*7.png does not exist"):
        RecordDataset(records, processor)[7]


def test_long_records_are_named_and_never_cut(pages, processor):
    rows = read_rows(pages / "train.jsonl")
    rows[2] = row(2, "x " * 100, ["2.png"])
    records = read_records([write_jsonl(pages / "train.jsonl", rows)])
    with pytest.raises(UserError, match=r"train.jsonl:3: 1\d\d tokens \(8 of them for 1 images\) are more than --m"):
        measure_records(records, processor, 100)
