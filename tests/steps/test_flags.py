"""Every flag of train acts: here on a few steps over text and a page, or in the test that the table names."""

import json
import re

import pytest
import torch

from mistral_ft.data.dataset import RecordDataset, measure_records
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import read_records
from mistral_ft.model.loading import load_base
from mistral_ft.training import arguments
from mistral_ft.training.arguments import LoraArguments, TrainParser
from mistral_ft.training.new_adapter import add_adapter
from mistral_ft.training.preflight import plan_training
from mistral_ft.training.trainer import FinetuneTrainer
from mistral_ft.training.training_arguments import FinetuneArguments
from tests.conftest import ROOT, TINY, make_page, row, write_jsonl

# Where a flag is shown to act, if not by `learned` below.
SHOWN = {
    "config": "training/test_config.py::test_the_runs_own_file_repeats_it",
    "dataset": "training/test_config.py::test_the_runs_own_file_repeats_it",
    "images_dir": "training/test_evaluation.py::test_answers_are_those_of_predict",
    "max_image_pixels": "data/test_pages.py::test_the_flag",
    "pdf_seconds": "data/test_pdf.py::test_the_flag",
    "keep_image_tag": "data/test_row_images.py::test_the_tag_is_text_for_who_says_so",
    "max_seq_length": "steps/test_cli.py::test_records_that_are_too_long",
    "model_id": "steps/test_cli.py::test_models_that_are_none",
    "base_dtype": "model/test_fp8.py::test_it_trains_predicts_and_merges",
    "init_adapter": "training/test_init_adapter.py::test_it_begins_where_the_other_run_ended",
    "load_in_4bit": "model/test_four_bit.py::test_it_trains_predicts_and_merges",
    "gpu_memory_gib": "needs a GPU: bench/train_speed.py",
    "packing": "training/test_trainer.py::test_packing_trains_every_record_once_an_epoch",
    "pack_length": "training/test_trainer.py::test_a_packed_run_is_resumed_with_the_same_packs",
    "compile": "training/test_trainer.py::test_compiled_layers_change_nothing",
    "shard_base": "training/test_distributed.py::test_two_processes_train_what_one_does",
    "save_minutes": "training/test_checkpoints.py::test_minutes_save_too",
    "eval_dataset": "training/test_evaluation.py::test_answers_are_those_of_predict",
    "eval_fraction": "training/test_evaluation.py::test_held_out_records_are_not_trained",
    "eval_generate": "training/test_evaluation.py::test_answers_are_those_of_predict",
    "early_stopping_patience": "training/test_evaluation.py::test_the_best_step_is_kept_and_restored",
}

PLAIN = {"max_steps": 3, "learning_rate": 1e-2, "lora_dropout": 0, "lr_scheduler_type": "constant"}
# A value of each flag, with the flags that it needs.
LEARNED = {
    "lora_rank": {"lora_rank": 3},
    "lora_alpha": {"lora_alpha": 3},
    "use_rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": '{"q_proj": 3}'},
    "alpha_pattern": {"alpha_pattern": '{"q_proj": 3}'},
    "lora_dropout": {"lora_dropout": 0.5},
    "target_modules": {"target_modules": ".*q_proj"},
    "num_lora_modules": {"num_lora_modules": 3},
    "lora_modules_truncate_tail": {"num_lora_modules": 3, "lora_modules_truncate_tail": True},
    "lora_modules_truncate_offset": {"num_lora_modules": 3, "lora_modules_truncate_offset": 2},
    "use_dora": {"use_dora": True},
    "vision_lora": {"vision_lora": True},
    "freeze_vision_tower": {"freeze_vision_tower": False},
    "train_projector": {"train_projector": True},
    "vision_lr": {"vision_lora": True, "vision_lr": 1e-3},
    "projector_lr": {"train_projector": True, "projector_lr": 1e-3},
    "loraplus_lr_ratio": {"loraplus_lr_ratio": 4.0},
}
# Of transformers' flags, those against overfitting.
LEARNED_TOO = {
    "weight_decay": {"weight_decay": 0.5},
    "warmup_steps": {"warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 3.0}},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "per_device_train_batch_size": {"per_device_train_batch_size": 2},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "max_grad_norm": {"max_grad_norm": 0.01, "optim": "sgd"},
    "optim": {"optim": "sgd"},
    "adam_beta2": {"adam_beta2": 0.5},
    "seed": {"seed": 1},
    "data_seed": {"data_seed": 1},
    "num_train_epochs": {"num_train_epochs": 2, "max_steps": -1},
}


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    """Train for a few steps: learn(flag=value, …) -> {name: tensor} of the adapter."""
    folder, made = tmp_path_factory.mktemp("flags"), {}
    make_page(folder / "page.png", 3)
    rows = [row(n, f"Answer {n}", text=f"Question {n}?") for n in range(4)] + [row(4, "A page", ["page.png"])]
    processor = Processor.from_folder(TINY)
    records = read_records([write_jsonl(folder / "rows.jsonl", rows)])
    sizes = measure_records(records, processor, 1000)

    def learn(**flags) -> dict[str, torch.Tensor]:
        key = json.dumps(flags, sort_keys=True)
        if key in made:
            return made[key]
        chosen = PLAIN | flags
        ours = {name: chosen.pop(name) for name in list(chosen) if name in LoraArguments.__dataclass_fields__}
        lora = LoraArguments(**ours)
        assert lora.problems() == []
        torch.manual_seed(0)
        model = add_adapter(load_base(TINY, torch.device("cpu")), lora, "models/tiny")
        args = FinetuneArguments(output_dir=str(folder), save_strategy="no", **chosen).begin()
        rates = {"vision_tower": lora.vision_lr, "multi_modal_projector": lora.projector_lr}
        rates = {part: rate for part, rate in rates.items() if rate is not None}
        ratio = lora.loraplus_lr_ratio or 1
        trainer = FinetuneTrainer(model=model, args=args, learning_rates=rates, b_rate_ratio=ratio)
        plan_training(trainer, RecordDataset(records, processor), sizes, arguments.SpeedArguments())
        trainer.train()
        made[key] = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        return made[key]

    return learn


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() != other.keys() or any(
        one[name].shape != other[name].shape or not torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("flag", [*LEARNED, *LEARNED_TOO])
def test_a_flag_changes_what_is_learned(learn, flag):
    values = (LEARNED | LEARNED_TOO)[flag]
    without = {name: value for name, value in values.items() if name != flag}
    if flag == "num_train_epochs":
        without = {"num_train_epochs": 1, "max_steps": -1}
    assert differ(learn(**values), learn(**without))


def test_the_same_flags_learn_the_same(learn):
    once = learn()
    assert not differ(once, learn(seed=42))  # the default, but trained again


def test_every_flag_is_in_the_table():
    kinds = [kind for name, kind in vars(arguments).items() if name.endswith("Arguments")]
    parser = TrainParser(kinds)
    flags = {action.dest for action in parser._actions} - {"help"}
    assert flags == {*SHOWN, *LEARNED}
    for flag, place in SHOWN.items():
        file, _, test = place.partition("::")
        if not re.search("^needs a GPU: ", place):
            text = (ROOT / "tests" / file).read_text()
            assert re.search(rf"\b{flag}\b", text), flag
            assert f"def {test}" in text
        else:
            assert (ROOT / place.split(": ")[1]).is_file()
