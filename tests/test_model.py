"""The model's paths that are ours: the vision tower page by page, and batches that equal single rows."""

import json
import shutil

import pytest
import torch
from transformers import Mistral3ForConditionalGeneration

from mistral_ft import model as model_module
from mistral_ft.data import Collator, RecordDataset
from mistral_ft.errors import UserError
from mistral_ft.images import ImageFitter
from mistral_ft.model import load_base, pick_device
from mistral_ft.prompt import PromptEncoder
from mistral_ft.records import read_records
from tests.conftest import TINY

CPU = torch.device("cpu")
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


@pytest.fixture
def dataset(pages):
    encoder, fitter = PromptEncoder.from_folder(TINY), ImageFitter.from_folder(TINY)
    return RecordDataset(read_records([pages / "train.jsonl"]), encoder, fitter)


@pytest.mark.parametrize("at_once", [1, 10**6])
def test_image_features_equal_those_of_transformers(model, reference, pixels, monkeypatch, at_once):
    monkeypatch.setattr(model_module, "MAX_TOWER_PATCHES", at_once)
    ours = model.model.get_image_features(pixels, torch.tensor(SIZES)).pooler_output
    theirs = reference.model.get_image_features(pixels, torch.tensor(SIZES)).pooler_output
    assert [page.shape for page in ours] == [(20, 128), (6, 128), (20, 128), (1, 128)]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_logits_equal_those_of_transformers(model, reference, dataset):
    batch = Collator(11)([dataset[i] for i in (0, 5, 6)])
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, reference(**batch).logits, atol=1e-4, rtol=1e-4)


def test_the_tower_sees_no_mask_and_no_other_size(model, pixels):
    seen = []
    layer = model.model.vision_tower.transformer.layers[0]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].shape[:2], args[1] if len(args) > 1 else None)),
        with_kwargs=True,
    )
    model.model.get_image_features(pixels, torch.tensor(SIZES))
    handle.remove()
    assert seen == [((2, 80), None), ((1, 24), None), ((1, 4), None)]


def test_frozen_parts_keep_no_graph(pixels):
    model = load_base(TINY, CPU).requires_grad_(False)
    sizes = torch.tensor(SIZES)
    assert not model.model.get_image_features(pixels, sizes).pooler_output[0].requires_grad
    model.model.multi_modal_projector.requires_grad_(True)
    tower_output = []
    model.model.vision_tower.transformer.register_forward_hook(lambda m, a, out: tower_output.append(out))
    assert model.model.get_image_features(pixels, sizes).pooler_output[0].requires_grad
    assert not tower_output[0].last_hidden_state.requires_grad
    model.model.vision_tower.requires_grad_(True)
    model.model.get_image_features(pixels, sizes).pooler_output[0].sum().backward()
    assert model.model.vision_tower.patch_conv.weight.grad is not None


def test_a_left_padded_batch_generates_what_single_rows_do(model, dataset):
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=11, eos_token_id=2)
    dataset.with_answers = False
    collate = Collator(11, "left")

    def generate(rows):
        batch = collate([dataset[i] for i in rows])
        batch.pop("labels")
        return model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].tolist()

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
    with pytest.raises(UserError, match="model_type is 'llama'; supported is 'mistral3'"):
        load_base(tmp_path, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_gpu_limit_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="--gpu_memory_gib: there is no GPU here to limit"):
        pick_device(78.5)
