"""Tiny random models of every supported architecture, with the real tokenizer files that mistral-common ships."""

import functools
import json
from pathlib import Path

import mistral_common
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.tokenization_utils_base import generate_merges

from tests.conftest import TINY

DATA = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = {
    "v1": DATA / "tokenizer.model.v1",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "v7": DATA / "mistral_instruct_tokenizer_241114.model.v7",
}
# What the versions since v11 put in the place of the first unused control tokens.
NEW_TOKENS = ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"]


@functools.cache
def sentencepiece_json(version: str) -> str:
    """The tokenizer.json that hub folders have beside such a tokenizer.model."""
    source = SentencePieceProcessor(model_file=str(SENTENCEPIECE[version]))
    ids = range(source.vocab_size())
    vocab = {source.id_to_piece(i): i for i in ids}
    # In order of rank, which the scores are.
    control = [i for i in ids if source.IsControl(i) or source.IsUnknown(i)]
    plain = {piece: i for piece, i in vocab.items() if i not in control and not source.IsByte(i)}
    scores = {piece: source.GetScore(i) for piece, i in plain.items()}
    tokenizer = Tokenizer(
        models.BPE(vocab, generate_merges(plain, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(source.id_to_piece(i), special=True, normalized=False) for i in control])
    # As on the hub: a space of its own before each text.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer.to_str()


def write_sentencepiece(folder: Path, version: str) -> None:
    """Write tokenizer.json and tokenizer_config.json of a SentencePiece model."""
    (folder / "tokenizer.json").write_text(sentencepiece_json(version), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizer"}))


def write_tekken(folder: Path, version: str) -> None:
    """Write a tekken.json of the given version, the start of a real one, without the tokenizer.json beside it."""
    data = json.loads((TINY / "tekken.json").read_text(encoding="utf-8"))
    data["config"]["version"] = version
    if version in ("v11", "v13"):
        for token, name in zip(data["special_tokens"][20:], NEW_TOKENS, strict=False):
            token["token_str"] = name
    if version == "v13":
        data["image"] = data.pop("multimodal")
    (folder / "tekken.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
VISION = dict(
    model_type="pixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
    patch_size=14, image_size=1540,
)  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 32, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def _vision_model(model_class, config_class, text_type: str, patch: int, **settings):
    text = TEXT | {"model_type": text_type, "vocab_size": 4096, "head_dim": 8}
    if text_type == "ministral3":
        text["rope_parameters"] = YARN
    text["tie_word_embeddings"] = settings.get("tie_word_embeddings", False)
    config = config_class(
        text_config=text, vision_config=VISION | {"patch_size": patch}, image_token_index=10, vision_feature_layer=-1,
        projector_hidden_act="gelu", **({"tie_word_embeddings": False} | settings),
    )  # fmt: skip
    return model_class, config


# name: (the model's class and config, what writes its tokenizer)
MODELS = {
    # A window that the records of the tests are longer than.
    "7B v0.1": (lambda: (MistralForCausalLM, MistralConfig(**TEXT, vocab_size=32000, sliding_window=8)), "v1"),
    "7B v0.2": (lambda: (MistralForCausalLM, MistralConfig(**TEXT, vocab_size=32000, sliding_window=None)), "v1"),
    "7B v0.3": (lambda: (MistralForCausalLM, MistralConfig(**TEXT, vocab_size=32768, sliding_window=None)), "v3"),
    # Heads narrower than the hidden size has room for.
    "Nemo": (
        lambda: (MistralForCausalLM, MistralConfig(**TEXT, vocab_size=4096, head_dim=4, sliding_window=None)),
        "v3-tekken",
    ),
    "tied": (
        lambda: (
            MistralForCausalLM,
            MistralConfig(**TEXT | {"tie_word_embeddings": True}, vocab_size=4096, sliding_window=None),
        ),
        "v7-tekken",
    ),
    "Ministral 3, text": (
        lambda: (Ministral3ForCausalLM, Ministral3Config(**TEXT, vocab_size=4096, head_dim=8, rope_parameters=YARN)),
        "v13-tekken",
    ),
    "Small 3.2": (
        lambda: _vision_model(Mistral3ForConditionalGeneration, Mistral3Config, "mistral", 14, spatial_merge_size=2),
        "v11-tekken",
    ),
    "Magistral": (
        lambda: _vision_model(Mistral3ForConditionalGeneration, Mistral3Config, "mistral", 14, spatial_merge_size=2),
        "v13-tekken",
    ),
    "Ministral 3": (
        lambda: _vision_model(
            Mistral3ForConditionalGeneration, Mistral3Config, "ministral3", 14, spatial_merge_size=2,
            tie_word_embeddings=True,
        ),
        "v13-tekken",
    ),
    "Pixtral-12B": (lambda: _vision_model(
            LlavaForConditionalGeneration, LlavaConfig, "mistral", 16, vision_feature_select_strategy="full"
        ),
        "v3-tekken",
    ),
}  # fmt: skip


def write_model(folder: Path, name: str) -> Path:
    """Write a model folder as the hub has it, with random weights in bf16."""
    folder.mkdir(parents=True)
    make, tokenizer = MODELS[name]
    version, _, kind = tokenizer.partition("-")
    (write_tekken if kind else write_sentencepiece)(folder, version)
    model_class, config = make()
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.06)  # smaller ones learn too slowly for a test
    model.to(torch.bfloat16).save_pretrained(folder)
    if hasattr(config, "vision_config"):
        settings = json.loads((TINY / "preprocessor_config.json").read_text())
        patch = config.vision_config.patch_size
        (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"patch_size": patch}))
    return folder


def sharpen(path: Path) -> None:
    """Scale a random model's head: no adapter could make such a one sure of anything."""
    weights = load_file(path)
    save_file({name: 20 * t if name.endswith("lm_head.weight") else t for name, t in weights.items()}, path)
