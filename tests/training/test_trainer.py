"""The trainer: the right loss, the same gradient however a batch is split, and resuming that changes nothing."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from transformers.models.mistral3.modeling_mistral3 import Mistral3Model

from mistral_ft.data.dataset import RecordDataset, RecordSize, measure_records
from mistral_ft.data.pages import open_image
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import read_records
from mistral_ft.errors import UserError
from mistral_ft.model.layers import EmbeddingNoise, LoraLinear, hashed_dropout
from mistral_ft.model.loading import load_base
from mistral_ft.prediction import losses
from mistral_ft.training import run_folder
from mistral_ft.training.arguments import LoraArguments, SpeedArguments
from mistral_ft.training.evaluation import Evaluator, Measuring
from mistral_ft.training.new_adapter import add_adapter, target_modules
from mistral_ft.training.optimizer import check_optimizer
from mistral_ft.training.preflight import Trial, largest, plan_layers, plan_training
from mistral_ft.training.trainer import FinetuneTrainer
from mistral_ft.training.training_arguments import FinetuneArguments
from tests.conftest import TINY, read_rows

ALL = LoraArguments(lora_dropout=0, vision_lora=True, train_projector=True)


@pytest.fixture
def dataset(pages):
    return RecordDataset(read_records([pages / "train.jsonl"]), Processor.from_folder(TINY))


@pytest.fixture
def make_trainer(dataset, tmp_path):
    sizes = measure_records(dataset.records, dataset.processor, 1000)

    def make(lora=ALL, speed=None, **arguments):
        torch.manual_seed(0)
        model = add_adapter(load_base(TINY, torch.device("cpu")), lora, "models/tiny")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide half of the gradients
                torch.nn.init.normal_(parameter, std=0.02)
        (tmp_path / "run").mkdir(exist_ok=True)
        args = FinetuneArguments(output_dir=str(tmp_path / "run"), save_strategy="no", **arguments).begin()
        trainer = FinetuneTrainer(model=model, args=args)
        plan_training(trainer, dataset, sizes, speed or SpeedArguments())
        return trainer

    return make


def loss_and_gradients(trainer, packs):
    """What the trainer makes of these records, laid out as they are told."""
    trainer.model.zero_grad()
    batch = trainer.data_collator([[trainer.train_dataset.dataset[number] for number in numbers] for numbers in packs])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def plain_loss_and_gradients(trainer, numbers):
    """What transformers and peft themselves make of the records, one by one, with all logits."""
    model = copy.deepcopy(trainer.model)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = PeftLinear
    core = model.get_base_model()
    for layers in (core.model.language_model.layers, core.model.vision_tower.transformer.layers):
        for layer in layers:
            del layer.forward
    core.model.__class__ = Mistral3Model
    core.config.vision_config._attn_implementation = core.config.text_config._attn_implementation = "sdpa"
    model.zero_grad()
    total, count = 0.0, 0
    for number in numbers:
        example = trainer.train_dataset.dataset[number]
        paths = trainer.train_dataset.dataset.records[number].image_paths
        batch = {"input_ids": torch.tensor([example.input_ids])}
        if paths:
            fitter = trainer.train_dataset.dataset.processor.fitter
            batch["pixel_values"] = torch.stack([torch.from_numpy(fitter.pixels(open_image(path))) for path in paths])
            batch["image_sizes"] = torch.tensor(example.image_sizes)
        labels = torch.tensor(example.labels)
        logits = model(**batch).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        count += (labels != -100).sum()
    loss = total / count
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same(found, expected, relative=1e-4):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        assert (found[1][name] - gradient).norm() <= relative * gradient.norm(), name


ROWS = [0, 5, 6, 7]  # a page, two pages, text alone, a system message


@pytest.mark.parametrize(
    ("speed", "packs"),
    [
        (SpeedArguments(), [[number] for number in ROWS]),
        (SpeedArguments(pack_length=400), [ROWS]),
        (SpeedArguments(pack_length=400), [[7, 5, 0, 6]]),
    ],
)
def test_loss_and_gradients_are_those_of_transformers_and_peft(make_trainer, speed, packs):
    trainer = make_trainer(speed=speed)
    assert_same(loss_and_gradients(trainer, packs), plain_loss_and_gradients(trainer, ROWS))


@pytest.mark.parametrize("speed", [SpeedArguments(), SpeedArguments(pack_length=400)])
def test_the_loss_of_an_evaluation_is_that_of_transformers_and_peft(make_trainer, dataset, speed):
    trainer = make_trainer(speed=speed, per_device_train_batch_size=1 if speed.pack_length else 3)
    sizes = measure_records(dataset.records, dataset.processor, 1000)
    how = Measuring(
        trainer.data_collator.length,
        lambda batch: trainer.compute_loss(trainer.model, batch, num_items_in_batch=1),
        stop_requested=lambda: False,
    )
    found = Evaluator(dataset, sizes, answered=0).measure(trainer.model, trainer.args, how)
    expected, _ = plain_loss_and_gradients(trainer, range(len(dataset)))
    assert found == {"eval_loss": pytest.approx(expected, rel=1e-5)}
    assert trainer.model.training


def test_layers_computed_twice_change_nothing(make_trainer):
    trainer = make_trainer()
    expected = loss_and_gradients(trainer, [ROWS])
    again = make_trainer(gradient_checkpointing=True)
    assert_same(loss_and_gradients(again, [ROWS]), expected, relative=1e-6)


@pytest.mark.slow
def test_compiled_layers_change_nothing(make_trainer):
    trainer = make_trainer(speed=SpeedArguments(pack_length=400, compile=True), gradient_checkpointing=True)
    assert_same(loss_and_gradients(trainer, [ROWS]), plain_loss_and_gradients(trainer, ROWS))


def test_variants_of_lora_compute_what_peft_does(make_trainer):
    lora = LoraArguments(
        lora_dropout=0, use_rslora=True, target_modules=".*(q_proj|down_proj)", rank_pattern='{"down_proj": 4}',
        alpha_pattern='{"layers.1.self_attn.q_proj": 5}',
    )  # fmt: skip
    trainer = make_trainer(lora=lora)
    layers = {name: module for name, module in trainer.model.named_modules() if isinstance(module, LoraLinear)}
    assert len(layers) == 2 * 4
    scaling = {name.split("layers.")[1]: module.scaling["default"] for name, module in layers.items()}
    assert scaling["0.self_attn.q_proj"] == 32 / 4  # alpha / sqrt(16)
    assert scaling["1.self_attn.q_proj"] == 5 / 4
    assert scaling["0.mlp.down_proj"] == 32 / 2
    assert_same(loss_and_gradients(trainer, [ROWS]), plain_loss_and_gradients(trainer, ROWS))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            {"target_modules": "q_proj"},
            "--target_modules q_proj: matches no linear layer of the text model, such as mo",
        ),
        ({"rank_pattern": '{"proj": 4}'}, "--rank_pattern: proj is the end of no adapted layer's name, such as model"),
        ({"alpha_pattern": '{"q_proj": 4}', "target_modules": ".*k_proj"}, "--alpha_pattern: q_proj is the end of no"),
    ],
)
def test_names_that_fit_no_layer_are_refused(arguments, problem):
    with pytest.raises(UserError) as stop:
        add_adapter(load_base(TINY, torch.device("cpu")), LoraArguments(**arguments), "models/tiny")
    assert str(stop.value).startswith(problem)


def test_noise_is_that_of_each_record_by_itself():
    """Neither the other records of a sequence nor what fills it up make it smaller."""
    model = torch.nn.Module()
    model.get_input_embeddings = lambda: embeddings
    embeddings = torch.nn.Embedding(10, 64)
    noise = EmbeddingNoise(model, alpha=8)
    ids = torch.ones(1, 1000, dtype=torch.int64)
    noise.bounds = torch.tensor([0, 4, 104, 1000, 1000, 1000], dtype=torch.int32)
    added = (embeddings(ids) - embeddings.weight[1])[0].abs()
    for start, end in ((0, 4), (4, 104), (104, 1000)):
        size = 8 / ((end - start) * 64) ** 0.5
        assert 0.95 * size < added[start:end].max() <= size + 1e-5
        assert added[start:end].mean().item() == pytest.approx(size / 2, rel=0.1)
    embeddings.eval()
    assert torch.equal(embeddings(ids)[0, 0], embeddings.weight[1])


def test_losses_of_many_labels_are_summed_in_parts(make_trainer, monkeypatch):
    trainer = make_trainer()
    whole = loss_and_gradients(trainer, [ROWS])
    monkeypatch.setattr(losses, "LABELS_AT_ONCE", 3)
    assert_same(loss_and_gradients(trainer, [ROWS]), whole, relative=1e-5)


def test_the_fill_carries_no_loss(make_trainer):
    trainer = make_trainer(speed=SpeedArguments(pack_length=400))
    batch = trainer.data_collator([[trainer.train_dataset.dataset[number] for number in ROWS]])
    before = trainer.compute_loss(trainer.model, batch).item()
    batch.input_ids[0, batch.num_tokens :] = 77
    assert trainer.compute_loss(trainer.model, batch).item() == before


def test_a_loss_is_divided_by_the_labels_of_the_accumulated_batch(make_trainer):
    trainer = make_trainer()
    batch = trainer.data_collator([[trainer.train_dataset.dataset[0]]])
    labels = len(batch.label_positions)
    alone = trainer.compute_loss(trainer.model, batch).item()
    assert trainer.compute_loss(trainer.model, batch, num_items_in_batch=4 * labels).item() == alone / 4


def test_dropout_drops_its_share_and_is_drawn_anew():
    seed = torch.tensor(12345, dtype=torch.int32)
    x = torch.ones(1000, 500)
    dropped = hashed_dropout(x, 0.05, seed)
    assert sorted(dropped.unique().tolist()) == [0, pytest.approx(1 / 0.95)]
    assert (dropped == 0).float().mean().item() == pytest.approx(0.05, abs=0.002)
    assert torch.equal(dropped, hashed_dropout(x, 0.05, seed))
    other = hashed_dropout(x, 0.05, seed + 1)
    both = ((dropped == 0) & (other == 0)).float().mean().item()
    assert both == pytest.approx(0.05**2, abs=0.0005)  # as independent draws would
    columns = (dropped == 0).float().mean(0)
    assert columns.std().item() == pytest.approx((0.05 * 0.95 / 1000) ** 0.5, rel=0.15)


def test_each_lora_layer_has_seeds_of_its_own(make_trainer):
    trainer = make_trainer(lora=LoraArguments(lora_dropout=0.1))
    layers = [module for module in trainer.model.modules() if isinstance(module, LoraLinear)]
    trainer.seeds.draw()
    seeds = [layer.seed.item() for layer in layers]
    assert len(set(seeds)) == len(layers) == 28
    torch.manual_seed(7)
    trainer.seeds.draw()
    first = [layer.seed.item() for layer in layers]
    torch.manual_seed(7)
    trainer.seeds.draw()
    assert [layer.seed.item() for layer in layers] == first != seeds


class Card:
    """A GPU of some GiB on which weights take 40 and each layer that is kept takes `each`; offloading saves 5."""

    def __init__(self, gib, each, hidden=0):
        self.gib, self.each, self.hidden, self.tried = gib, each, hidden, []

    def __call__(self, recomputed, offloaded):
        kept = max(0, 40 - recomputed - self.hidden)
        peak = 40 + self.each * kept + (0 if offloaded else 5)
        self.tried.append((recomputed, offloaded))
        return Trial(recomputed, offloaded, peak if peak <= self.gib else None, 1.0)


@pytest.mark.parametrize(
    ("card", "plan"),
    [
        (Card(79, 0.5), (0, False)),  # all fits
        (Card(79, 1.0), (7, False)),  # 45 + 33 = 78 <= 78.25
        (Card(79, 1.0, hidden=2), (5, False)),
        (Card(79, 9.0), (37, False)),  # a 32k record: three layers
        (Card(47, 1.0), (40, False)),
        (Card(44.9, 1.0), (40, True)),
    ],
)
def test_the_fastest_plan_that_fits_is_found(card, plan):
    trials = plan_layers(40, card.gib - 0.75, card)
    assert trials[-1].peak_gib is not None
    recomputed, offloaded = plan
    assert (trials[-1].offloaded, trials[-1].recomputed) == (offloaded, pytest.approx(recomputed, abs=3))
    assert trials[-1].recomputed >= recomputed
    assert len(card.tried) <= 6


def test_a_card_too_small_for_anything_has_no_plan():
    assert plan_layers(40, 38.0, Card(39, 1.0))[-1].peak_gib is None


def test_the_largest_batches_are_tried():
    sizes = [RecordSize(10, 0, 9), RecordSize(90, 40, 1), RecordSize(50, 80, 1), RecordSize(20, 0, 3)]
    assert largest(sizes, [[0], [1], [2], [3]], at_once=1) == [[1], [2], [0]]
    assert largest(sizes, [[0, 1], [2, 3]], at_once=1) == [[0], [1]]
    assert largest(sizes, [[0], [1], [2], [3]], at_once=2) == [[1, 2], [0, 3]]


def gradients_of_a_step(make_trainer, batch_size, accumulation):
    """The gradients and loss of the first optimizer step, over the same four rows in the same order."""
    trainer = make_trainer(
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=1, max_grad_norm=1e9
    )
    trainer.train_dataset = torch.utils.data.Subset(trainer.train_dataset, [0, 5, 6, 7])
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
    assert len(whole) == 2 * (28 + 28 + 3)
    for batch_size, accumulation in ((2, 2), (1, 4)):
        split, split_loss = gradients_of_a_step(make_trainer, batch_size, accumulation)
        assert split_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in whole.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(split[name], gradient, rtol=1e-3, atol=1e-5)


def test_only_the_adapter_learns(make_trainer):
    model = make_trainer().model
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == set()


LAYERS = "model.language_model.layers"
LAST = [f"{LAYERS}.3.{name}" for name in ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")]


def adapted_layers(**arguments) -> list[str]:
    model = add_adapter(load_base(TINY, torch.device("cpu")), LoraArguments(**arguments), "models/tiny")
    return sorted(n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A"))


def test_all_linear_layers_of_the_text_model_are_adapted():
    names = adapted_layers()
    assert len(names) == 28
    assert all(name.startswith(LAYERS) for name in names)


def test_the_vision_tower_and_the_projector_are_adapted_when_asked_for():
    assert sum(".vision_tower." in name for name in adapted_layers(vision_lora=True)) == 28
    names = adapted_layers(train_projector=True)
    assert [name for name in names if LAYERS not in name] == [
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
        "model.multi_modal_projector.patch_merger.merging_layer",
    ]


def test_truncation_counts_linear_layers_from_either_end():
    first = [f"{LAYERS}.0.self_attn.{name}" for name in ("k_proj", "q_proj")]
    assert adapted_layers(num_lora_modules=3) == LAST
    assert adapted_layers(num_lora_modules=3, lora_modules_truncate_offset=7) == [n.replace("3.m", "2.m") for n in LAST]
    assert adapted_layers(num_lora_modules=2, lora_modules_truncate_tail=True) == first
    names = adapted_layers(num_lora_modules=3, lora_modules_truncate_tail=True, lora_modules_truncate_offset=4)
    assert names == [n.replace("3.m", "0.m") for n in LAST]


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
    with pytest.raises(UserError, match="the text model has 28 linear layers"):
        target_modules(model, LoraArguments(num_lora_modules=27, lora_modules_truncate_offset=2))


def test_learning_rates_of_parts(make_trainer):
    trainer = make_trainer(learning_rate=1e-3)
    trainer.learning_rates = {"vision_tower": 1e-5, "multi_modal_projector": 1e-4}
    groups = trainer.create_optimizer().param_groups
    assert {group["lr"]: len(group["params"]) for group in groups} == {1e-3: 56, 1e-5: 56, 1e-4: 6}


def test_lora_plus_speeds_up_the_b_matrices(make_trainer):
    trainer = make_trainer(learning_rate=1e-3)
    trainer.learning_rates, trainer.b_rate_ratio = {"vision_tower": 1e-5}, 16
    groups = trainer.create_optimizer().param_groups
    assert {group["lr"]: len(group["params"]) for group in groups} == {1e-3: 31, 1.6e-2: 31, 1e-5: 28, 1.6e-4: 28}
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    assert all(("lora_B" in names[p]) == (group["lr"] in (1.6e-2, 1.6e-4)) for group in groups for p in group["params"])


def test_a_part_that_learns_nothing_stops_the_run(make_trainer):
    trainer = make_trainer(max_steps=2, per_device_train_batch_size=8)
    trainer.model.register_parameter("lora_left_out", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(AssertionError, match="1 trainable tensors have no gradient, such as lora_left_out"):
        trainer.train()


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_stops_the_run(make_trainer, pages, broken):
    trainer = make_trainer(max_steps=2)

    def loss(model, inputs, **kwargs):
        right = FinetuneTrainer.compute_loss(trainer, model, inputs)
        if broken == "gradient":
            right.register_hook(lambda gradient: gradient * float("inf"))
        return right if broken == "gradient" else right * float("nan")

    trainer.compute_loss = loss
    before = [parameter.detach().clone() for parameter in trainer.trained.values()]
    with pytest.raises(UserError) as stop:
        trainer.train()
    # Of seed 42 the first record is the seventh.
    assert str(stop.value).endswith(
        f"of step 1 is no finite number, the step was not made; its records: {pages / 'train.jsonl'}:7; look at them, "
        "or lower --learning_rate"
    )
    assert all(map(torch.equal, trainer.trained.values(), before))


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_eval": True}, {"label_smoothing_factor": 0.1}, {"fp16": True}, {"torch_compile": True},
        {"save_only_model": True}, {"remove_unused_columns": True},
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
        ({"rank_pattern": "{q: 1"}, "--rank_pattern {q: 1: expected patterns and whole numbers, such as {"),
        ({"rank_pattern": '{"q": 0}'}, "expected patterns and whole numbers"),
        ({"alpha_pattern": '{"q(": 1}'}, "expected patterns and whole numbers"),
        ({"target_modules": "("}, "--target_modules (: no regular expression: "),
        ({"target_modules": ".*", "num_lora_modules": 3}, "--target_modules and --num_lora_modules: give one of them"),
        ({"loraplus_lr_ratio": 0.0}, "--loraplus_lr_ratio 0.0: must be more than 0"),
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


@pytest.mark.parametrize("arguments", [{"adam_beta2": 1.5}, {"optim": "galore_adamw"}, {"optim_args": "x"}])
def test_optimizers_that_cannot_be_built_are_refused_early(arguments, tmp_path):
    with pytest.raises(UserError, match="--optim"):
        check_optimizer(FinetuneArguments(output_dir=str(tmp_path), **arguments).begin())


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


def test_a_packed_run_is_resumed_with_the_same_packs(pages, train_tiny, tmp_path):
    settings = ("--pack_length", 256, "--save_steps", 3, "--max_steps", 7, "--lora_dropout", 0.1)
    whole = train_tiny(pages / "train.jsonl", *settings)
    assert json.loads((whole / "run.json").read_text())["pack_length"] == 256
    stopped = tmp_path / "output" / "stopped"
    shutil.copytree(whole, stopped)
    for name in ("checkpoint-6", "checkpoint-7"):
        shutil.rmtree(stopped / name)
    resumed = train_tiny(pages / "train.jsonl", *settings, "--resume_from_checkpoint", stopped)
    assert (resumed / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_packing_trains_every_record_once_an_epoch(pages, train_tiny):
    run = train_tiny(pages / "train.jsonl", "--packing", True, "--num_train_epochs", 2)
    steps = json.loads((run / "trainer_state.json").read_text())["global_step"]
    assert steps == 2 * 2  # four short records of eight to a sequence, at most


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--pack_length", 20), "--pack_length 20: the longest record has"),
        (("--pack_length", 0), "--pack_length 0: must be at least 1"),
        (("--packing", False, "--pack_length", 500), "--pack_length has no effect with --packing False"),
        (("--packing", True, "--per_device_train_batch_size", 2), "use --gradient_accumulation_steps"),
        (("--bf16", True), "--bf16 True: the base is trained in bfloat16 on a GPU and in float32 on a CPU"),
    ],
)
def test_layouts_that_cannot_be_are_refused(pages, run_cli, tmp_path, arguments, problem):
    data = pages / "train.jsonl"
    code, _, err = run_cli("train", "--model_id", TINY, "--dataset", data, "--output_dir", tmp_path, *arguments)
    assert code == 2
    assert problem in err
    assert list(tmp_path.glob("*-*")) == []


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
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 56


def test_data_is_hashed_once_for_a_new_run(pages, train_tiny, monkeypatch):
    hashed, digest = [], run_folder.sha256_file
    monkeypatch.setattr(run_folder, "sha256_file", lambda path: hashed.append(Path(path).name) or digest(path))
    run = train_tiny(pages / "train.jsonl", "--max_steps", 1, "--save_strategy", "no")
    assert hashed.count("train.jsonl") == 1
    made = json.loads((run / "run.json").read_text())
    assert made["resume"]["data"] == [digest(pages / "train.jsonl")] == [f["sha256"] for f in made["data"]["files"]]
