"""The model's paths that are ours: the vision tower page by page, and batches that equal single rows."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import Mistral3ForConditionalGeneration

from mistral_ft.data.collators import PromptCollator
from mistral_ft.data.dataset import RecordDataset
from mistral_ft.data.image_fitter import to_patches
from mistral_ft.data.pages import open_image
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import read_records
from mistral_ft.errors import UserError
from mistral_ft.model import vision
from mistral_ft.model.device import pick_device
from mistral_ft.model.loading import load_base
from mistral_ft.model.vision import patch_positions
from tests.conftest import TINY

CPU = torch.device("cpu")
HIDDEN = json.loads((TINY / "config.json").read_text())["text_config"]["hidden_size"]
SIZES = [[112, 140], [56, 84], [112, 140], [28, 28]]


@pytest.fixture(scope="module")
def model():
    return load_base(TINY, CPU).eval()


@pytest.fixture(scope="module")
def reference():
    return Mistral3ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pixels():
    torch.manual_seed(0)
    return torch.randn(4, 3, 112, 140)


@pytest.fixture(scope="module")
def patches(pixels):
    """The same images as our tower takes them."""
    cut = [to_patches(image[:, :h, :w].numpy(), 14, 28) for image, (h, w) in zip(pixels, SIZES, strict=True)]
    return torch.from_numpy(np.concatenate(cut))


@pytest.fixture
def dataset(pages):
    return RecordDataset(read_records([pages / "train.jsonl"]), Processor.from_folder(TINY))


@pytest.mark.parametrize("at_once", [1, 100, 10**6])
def test_image_features_equal_those_of_transformers(model, reference, pixels, patches, monkeypatch, at_once):
    monkeypatch.setattr(vision, "MAX_TOWER_PATCHES", at_once)
    ours = model.model.get_image_features(patches, SIZES).pooler_output
    theirs = reference.model.get_image_features(pixels, torch.tensor(SIZES)).pooler_output
    assert [page.shape for page in ours] == [(20, HIDDEN), (6, HIDDEN), (20, HIDDEN), (1, HIDDEN)]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_logits_equal_those_of_transformers(model, reference, dataset):
    for number in (0, 5, 6):
        batch = PromptCollator(11)([dataset[number]])
        with torch.no_grad():
            ours = model(**batch).logits
            if paths := dataset.records[number].image_paths:
                pages = [torch.from_numpy(dataset.processor.fitter.pixels(open_image(path))) for path in paths]
                sizes = torch.tensor(batch["image_sizes"])
                batch = batch | {"pixel_values": torch.stack(pages), "image_sizes": sizes}
            torch.testing.assert_close(ours, reference(**batch).logits, atol=1e-4, rtol=1e-4)


def test_patches_stand_cell_by_cell():
    assert patch_positions(2, 4, 2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    # Every pixel says where it is: 100 * row + column of its patch.
    rows, columns = np.divmod(np.arange(28 * 56), 56)
    pixels = (100 * (rows // 14) + columns // 14).reshape(1, 28, 56).repeat(3, 0)
    assert to_patches(pixels, 14, 28)[:, 0].tolist() == [0, 1, 100, 101, 2, 3, 102, 103]
    assert (to_patches(pixels, 14, 28) == to_patches(pixels, 14, 28)[:, :1]).all()


def test_the_tower_sees_where_each_page_begins_and_no_mask(model, patches):
    seen = []
    layer = model.model.vision_tower.transformer.layers[0]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].shape[:2], args[1], kwargs["cu_seq_lens"].tolist())),
        with_kwargs=True,
    )
    model.model.get_image_features(patches, SIZES)
    handle.remove()
    assert seen == [((1, 188), None, [0, 80, 104, 184, 188])]


def test_frozen_parts_keep_no_graph(patches):
    model = load_base(TINY, CPU).requires_grad_(False)
    assert not model.model.get_image_features(patches, SIZES).pooler_output[0].requires_grad
    model.model.multi_modal_projector.requires_grad_(True)
    tower_output = []
    last = model.model.vision_tower.transformer.layers[-1]
    last.register_forward_hook(lambda module, args, output: tower_output.append(output))
    assert model.model.get_image_features(patches, SIZES).pooler_output[0].requires_grad
    assert not tower_output[0].requires_grad
    model.model.vision_tower.requires_grad_(True)
    model.model.get_image_features(patches, SIZES).pooler_output[0].sum().backward()
    assert model.model.vision_tower.patch_conv.weight.grad is not None


def test_a_left_padded_batch_generates_what_single_rows_do(model, dataset):
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=11, eos_token_id=2)
    dataset.with_answers = False
    collate = PromptCollator(11)

    def generate(rows):
        batch = collate([dataset[i] for i in rows])
        answers = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].tolist()
        return [[token for token in answer if token != 11] for answer in answers]

    rows = range(len(dataset))
    assert generate(rows) == [generate([i])[0] for i in rows]


def test_a_folder_without_all_weights_is_refused(tmp_path):
    for path in TINY.glob("*"):
        if path.is_file() and path.name != "model.safetensors.index.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"weights are missing for its config.json, such as model"):
        load_base(tmp_path, CPU)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config: config["text_config"].update(num_hidden_layers=1), "weights are left over for its config"),
        (lambda config: config["text_config"].update(intermediate_size=100), "weights are misshapen for its config"),
        (lambda config: config.pop("text_config"), "broken: no text_config"),
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(tmp_path, change, reason):
    shutil.copytree(TINY, tmp_path / "base")
    config = json.loads((TINY / "config.json").read_text())
    change(config)
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=reason):
        load_base(tmp_path / "base", CPU)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"])
def test_a_file_cut_in_half_is_refused(tmp_path, name):
    shutil.copytree(TINY, tmp_path / "base")
    data = (TINY / name).read_bytes()
    (tmp_path / "base" / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"config.json: broken|cannot be loaded"):
        load_base(tmp_path / "base", CPU)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config.json: missing, so .* is no model folder"):
        load_base(tmp_path, CPU)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model_type is 'llama'; supported are mistral3, llava, mistral, ministral3"):
        load_base(tmp_path, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_gpu_limit_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="--gpu_memory_gib: there is no GPU here to limit"):
        pick_device(78.5)
