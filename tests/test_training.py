"""The trainer: the right loss, the same gradient however a batch is split, and resuming that changes nothing."""

import json
import shutil

import pytest
import torch
from peft import PeftModel

from mistral_ft.arguments import LoraArguments
from mistral_ft.data import Collator, RecordDataset
from mistral_ft.errors import UserError
from mistral_ft.images import ImageFitter
from mistral_ft.lora import add_adapter, target_modules
from mistral_ft.model import load_base
from mistral_ft.prompt import PromptEncoder
from mistral_ft.records import read_records
from mistral_ft.training import FinetuneArguments, FinetuneTrainer, check_optimizer
from tests.conftest import TINY, read_rows

ALL = LoraArguments(lora_dropout=0, vision_lora=True, train_projector=True)


@pytest.fixture
def dataset(pages):
    encoder, fitter = PromptEncoder.from_folder(TINY), ImageFitter.from_folder(TINY)
    return RecordDataset(read_records([pages / "train.jsonl"]), encoder, fitter)


@pytest.fixture
def make_trainer(dataset, tmp_path):
    def make(lora=ALL, **arguments):
        torch.manual_seed(0)
        model = add_adapter(load_base(TINY, torch.device("cpu")), lora, "models/tiny")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide half of the gradients
                torch.nn.init.normal_(parameter, std=0.02)
        args = FinetuneArguments(output_dir=str(tmp_path / "run"), save_strategy="no", **arguments)
        return FinetuneTrainer(model=model, args=args, train_dataset=dataset, data_collator=Collator(11))

    return make


def plain_loss(trainer, rows):
    """What transformers' own forward says, with all logits."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
    return trainer.model.base_model.model(**batch).loss, batch


def test_the_loss_at_label_positions_equals_the_plain_one(make_trainer):
    trainer = make_trainer()
    expected, batch = plain_loss(trainer, range(8))
    labels = (batch["labels"] != -100).sum()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=2 * labels), expected / 2
    )


def test_logits_are_computed_at_label_positions_only(make_trainer):
    trainer = make_trainer()
    _, batch = plain_loss(trainer, [0, 6])
    _, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    positions = (batch["labels"][:, 1:] != -100).any(0).sum()
    assert outputs.logits.shape[1] == positions < batch["labels"].shape[1] / 2


def test_the_loss_of_a_batch_is_that_of_its_rows(make_trainer):
    trainer = make_trainer()
    total, labels = 0.0, 0
    for i in range(8):
        loss, batch = plain_loss(trainer, [i])
        count = (batch["labels"] != -100).sum()
        total, labels = total + loss * count, labels + count
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), total / labels, rtol=1e-5, atol=1e-5)


def test_padding_carries_no_loss(make_trainer):
    trainer = make_trainer()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (1, 6)])
    before = trainer.compute_loss(trainer.model, dict(batch))
    batch["input_ids"][batch["attention_mask"] == 0] = 77
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), before, rtol=1e-6, atol=1e-6)


def gradients_of_a_step(make_trainer, batch_size, accumulation):
    """The gradients and loss of the first optimizer step, over the same four rows in the same order."""
    trainer = make_trainer(
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=1, max_grad_norm=1e9
    )
    trainer.train_dataset = torch.utils.data.Subset(trainer.train_dataset, [0, 5, 6, 7])
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(trainer.train_dataset)
    found = {}

    class Keep(trainer_callback()):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    trainer.add_callback(Keep())
    trainer.train()
    return found, trainer.state.log_history[0]["loss"]


def trainer_callback():
    from transformers import TrainerCallback

    return TrainerCallback


def test_gradients_do_not_depend_on_how_a_batch_is_split(make_trainer):
    whole, loss = gradients_of_a_step(make_trainer, 4, 1)
    assert len(whole) == 2 * (21 + 14 + 3)
    for batch_size, accumulation in ((2, 2), (1, 4)):
        split, split_loss = gradients_of_a_step(make_trainer, batch_size, accumulation)
        assert split_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in whole.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(split[name], gradient, rtol=1e-3, atol=1e-5)


def test_checkpointing_changes_no_gradient(make_trainer):
    plain, _ = gradients_of_a_step(make_trainer, 4, 1)
    checkpointed, _ = gradients_of_a_step(lambda **k: make_trainer(gradient_checkpointing=True, **k), 4, 1)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


def test_only_the_adapter_learns(make_trainer):
    model = make_trainer().model
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == set()


LAYERS = "model.language_model.layers"
LAST = [f"{LAYERS}.2.{name}" for name in ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")]


def adapted_layers(**arguments) -> list[str]:
    model = add_adapter(load_base(TINY, torch.device("cpu")), LoraArguments(**arguments), "models/tiny")
    return sorted(n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A"))


def test_all_linear_layers_of_the_text_model_are_adapted():
    names = adapted_layers()
    assert len(names) == 21
    assert all(name.startswith(LAYERS) for name in names)


def test_the_vision_tower_and_the_projector_are_adapted_when_asked_for():
    assert sum(".vision_tower." in name for name in adapted_layers(vision_lora=True)) == 14
    names = adapted_layers(train_projector=True)
    assert [name for name in names if LAYERS not in name] == [
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
        "model.multi_modal_projector.patch_merger.merging_layer",
    ]


def test_truncation_counts_linear_layers_from_either_end():
    first = [f"{LAYERS}.0.self_attn.{name}" for name in ("k_proj", "q_proj")]
    assert adapted_layers(num_lora_modules=3) == LAST
    assert adapted_layers(num_lora_modules=3, lora_modules_truncate_offset=7) == [n.replace("2.m", "1.m") for n in LAST]
    assert adapted_layers(num_lora_modules=2, lora_modules_truncate_tail=True) == first
    names = adapted_layers(num_lora_modules=3, lora_modules_truncate_tail=True, lora_modules_truncate_offset=4)
    assert names == [n.replace("2.m", "0.m") for n in LAST]


def test_rank_alpha_dropout_and_dora_reach_the_layers():
    arguments = LoraArguments(lora_rank=3, lora_alpha=12, lora_dropout=0.25, use_dora=True)
    model = add_adapter(load_base(TINY, torch.device("cpu")), arguments, "the/base")
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert {layer.lora_A["default"].out_features for layer in layers} == {3}
    assert {layer.scaling["default"] for layer in layers} == {4.0}
    assert {layer.lora_dropout["default"].p for layer in layers} == {0.25}
    assert all("default" in layer.lora_magnitude_vector for layer in layers)
    assert model.peft_config["default"].base_model_name_or_path == "the/base"


def test_truncation_that_does_not_fit_is_refused():
    model = load_base(TINY, torch.device("cpu"))
    with pytest.raises(UserError, match="the text model has 21 linear layers"):
        target_modules(model, LoraArguments(num_lora_modules=20, lora_modules_truncate_offset=2))


def test_learning_rates_of_parts(make_trainer):
    trainer = make_trainer(learning_rate=1e-3)
    trainer.learning_rates = {"vision_tower": 1e-5, "multi_modal_projector": 1e-4}
    groups = trainer.create_optimizer().param_groups
    assert {group["lr"]: len(group["params"]) for group in groups} == {1e-3: 42, 1e-5: 28, 1e-4: 6}


def test_a_part_that_learns_nothing_stops_the_run(make_trainer):
    trainer = make_trainer(max_steps=2, per_device_train_batch_size=8)
    trainer.model.register_parameter("lora_left_out", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(AssertionError, match="1 trainable tensors have no gradient, such as lora_left_out"):
        trainer.train()


def test_a_loss_that_is_no_number_stops_the_run(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.compute_loss = lambda model, inputs, **k: (
        FinetuneTrainer.compute_loss(trainer, model, inputs) * float("nan")
    )
    with pytest.raises(UserError, match="the loss is nan at step 1; start again, lower --learning_rate"):
        trainer.train()


@pytest.mark.parametrize(
    "arguments",
    [
        {"eval_strategy": "steps"}, {"label_smoothing_factor": 0.1}, {"fp16": True}, {"torch_compile": True},
        {"save_only_model": True}, {"remove_unused_columns": True}, {"load_best_model_at_end": True},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"push_to_hub": True}, {"disable_tqdm": True},
    ],
)  # fmt: skip
def test_arguments_that_cannot_act_are_refused_by_name(arguments, tmp_path):
    with pytest.raises(ValueError, match=f"--{next(iter(arguments))}|checkpointing is never re-entrant"):
        FinetuneArguments(output_dir=str(tmp_path), **arguments)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"vision_lora": True, "freeze_vision_tower": True}, "contradict each other"),
        ({"vision_lr": 1e-5}, "--vision_lr has no effect without --vision_lora True"),
        ({"projector_lr": 1e-5}, "--projector_lr has no effect without --train_projector True"),
        ({"lora_modules_truncate_tail": True}, "need --num_lora_modules"),
        ({"lora_alpha": 0}, "--lora_alpha 0: must be at least 1"),
        ({"num_lora_modules": -7}, "--num_lora_modules -7: must be at least 1, or -1 for all"),
        ({"lora_rank": 0}, "--lora_rank 0: must be at least 1"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0: must be"),
    ],
)
def test_lora_arguments_without_effect_are_refused(arguments, problem):
    (found,) = LoraArguments(**arguments).problems()
    assert problem in found


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_steps": 0}, {"max_steps": -5}, {"num_train_epochs": 0.0}, {"num_train_epochs": float("nan")},
        {"per_device_train_batch_size": 0}, {"gradient_accumulation_steps": -1}, {"learning_rate": float("nan")},
        {"learning_rate": 0.0}, {"seed": -1}, {"dataloader_num_workers": -1},
    ],
)  # fmt: skip
def test_values_that_would_train_nothing_are_refused_by_name(arguments, tmp_path):
    with pytest.raises(ValueError, match=f"--{next(iter(arguments))} .*: out of range"):
        FinetuneArguments(output_dir=str(tmp_path), **arguments)


@pytest.mark.parametrize("arguments", [{"adam_beta2": 1.5}, {"optim": "adamw_bnb_8bit"}, {"optim_args": "x"}])
def test_optimizers_that_cannot_be_built_are_refused_early(arguments, tmp_path):
    with pytest.raises(UserError, match="--optim"):
        check_optimizer(FinetuneArguments(output_dir=str(tmp_path), **arguments))


def test_freeze_vision_tower_false_adapts_the_tower():
    arguments = LoraArguments(freeze_vision_tower=False)
    assert arguments.problems() == []
    assert arguments.vision_lora


TRAIN = ("--per_device_train_batch_size", 2, "--save_steps", 3, "--max_steps", 8, "--lora_dropout", 0.1)


def test_a_resumed_run_is_an_uninterrupted_one(pages, train_tiny, tmp_path):
    whole = train_tiny(pages / "train.jsonl", *TRAIN)
    # As if it had died at step 8: only the checkpoints of steps 3 and 6 are there.
    stopped = tmp_path / "output" / "stopped"
    shutil.copytree(whole, stopped)
    for path in [stopped / "checkpoint-8", stopped / "adapter_model.safetensors", stopped / "adapter_config.json"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = stopped / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:50])  # half-written: the checkpoint must be passed over
    resumed = train_tiny(pages / "train.jsonl", *TRAIN, "--resume_from_checkpoint", stopped)

    def losses(folder):
        state = json.loads((folder / "trainer_state.json").read_text())
        return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}

    assert resumed == stopped
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 8
    assert (resumed / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_run_is_not_continued_with_other_data_or_settings(pages, train_tiny, run_cli, tmp_path):
    data = pages / "train.jsonl"
    run = train_tiny(data, *TRAIN)
    same = ["--model_id", TINY, "--output_dir", tmp_path, "--resume_from_checkpoint", run, "--dataset", data, *TRAIN]
    same += ["--learning_rate", "2e-3"]
    assert run_cli("train", *same)[0] == 0
    code, _, err = run_cli("train", *same, "--lora_rank", 4, "--learning_rate", "1e-3", "--seed", 1)
    assert code == 2
    assert "cannot be continued with another --lora_rank, --learning_rate, --seed; its own are in its run.json" in err
    with open(data, "a") as file:
        file.write(json.dumps(read_rows(data)[0]) + "\n")
    code, _, err = run_cli("train", *same)
    assert code == 2
    assert "cannot be continued with another data; " in err


def test_the_run_folder_holds_what_made_it(pages, train_tiny):
    run = train_tiny(pages / "train.jsonl", "--max_steps", 1, "--vision_lora", True)
    made = json.loads((run / "run.json").read_text())
    assert made["base_model"] == str(TINY)
    assert made["data"]["rows"] == 8
    assert made["settings"]["lora"] == {"lora_dropout": 0.0, "vision_lora": True}
    assert made["prompt"]["template"] == "v7-tekken"
    assert set(made["versions"]) >= {"python", "torch", "transformers", "peft"}
    assert not list(run.glob(".*"))
    model = PeftModel.from_pretrained(load_base(TINY, torch.device("cpu")), run)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 35
