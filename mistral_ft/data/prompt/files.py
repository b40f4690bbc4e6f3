"""What a run and a merged model keep of their prompt, for other programs too."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from mistral_ft.data.conversation import to_json
from mistral_ft.data.prompt.encoder import ABSENT, PromptEncoder
from mistral_ft.files import read_settings, write_json

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


# Files that make a folder's tokenizer and processor; they go with every adapter and merged model.
PROMPT_FILES = (
    "tekken.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip


def save_prompt_files(base: str | os.PathLike, folder: str | os.PathLike) -> str:
    """Write the tokenizer, processor and chat template that reproduce the encoder's ids into `folder`.

    The base's own files are copied where they do. Its tokenizer.json gets the right pattern, and its chat template,
    which may add a default system message with a date, is replaced by one that writes what the encoder writes.

    Returns:
        `PromptEncoder.template`.
    """
    base, folder = Path(base), Path(folder)
    for name in PROMPT_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    encoder = PromptEncoder.from_folder(base)
    encoder.tokenizer.encode_special_tokens = False
    encoder.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    layout = {name: value for name, value in asdict(encoder.version).items() if name != "models"}
    layout |= {"space": encoder.space, "thinking": encoder.control.think != ABSENT}
    settings = f"{{%- set version = {to_json(layout)} -%}}\n"
    (folder / "chat_template.jinja").write_text(settings + CHAT_TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")

    config_path = folder / "tokenizer_config.json"
    config = read_settings(config_path) if config_path.is_file() else {}
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    if encoder.space:
        # transformers builds its Llama tokenizers anew, with a space of their own, instead of reading tokenizer.json.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    pad = encoder.tokenizer.id_to_token(encoder.control.pad)
    for name, token in {"bos": "<s>", "eos": "</s>", "pad": pad, "unk": "<unk>"}.items():
        config[f"{name}_token"] = config.get(f"{name}_token") or token
    config.pop("chat_template", None)
    # Tells transformers that the pattern is right, so that it neither warns nor asks for the flag.
    config["fix_mistral_regex"] = True
    write_json(config_path, config)
    return encoder.template
