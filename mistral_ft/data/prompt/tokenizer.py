"""The tokenizer of a model's folder, with the ids of mistral-common."""

import os
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from mistral_ft.errors import UserError
from mistral_ft.files import read_settings

# Tekken's own pattern, as every tekken.json since 2024-07 has it. The tokenizer.json on the hub has another one, which
# gives wrong ids: https://github.com/huggingface/transformers/issues/42299
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The folder's tokenizer, prepared so that its ids are mistral-common's, whatever its tokenizer.json says.

    Tekken gets its own pre-tokenizer pattern. SentencePiece gets no space of its own: `PromptEncoder` writes it.

    Raises:
        UserError: if the folder has neither tokenizer.json nor tekken.json, or one is broken.
    """
    folder = Path(folder)
    tekken, fast = folder / "tekken.json", folder / "tokenizer.json"
    if fast.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(fast))
        except Exception as error:  # tokenizers raises nothing more special
            raise UserError(f"{fast}: broken: {error}") from None
    elif tekken.is_file():
        from transformers.integrations.mistral.tokenizer import MistralConverter  # slow to import

        try:
            return MistralConverter(vocab_file=str(tekken)).converted()
        except (ImportError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{tekken}: cannot be used: {str(error).strip().splitlines()[0]}") from None
    else:
        raise UserError(f"{folder}: has neither tokenizer.json nor tekken.json, so it is no model folder")
    if is_sentencepiece(tokenizer):
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = None
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return tokenizer
    config = read_settings(tekken).get("config") if tekken.is_file() else None
    pattern = config.get("pattern") if isinstance(config, dict) else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern or TEKKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def is_sentencepiece(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is one of SentencePiece's, as up to Mistral-7B v0.3: they fall back on bytes."""
    return bool(getattr(tokenizer.model, "byte_fallback", False))
