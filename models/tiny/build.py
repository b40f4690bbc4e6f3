"""Build all of the embedded base but its weights, in the file layout of Mistral-Small-3.1's hub repository.

    python -m models.tiny.build [--output models/tiny] [--tekken tekken_240911.json]

The weights come from `models.pretraining`. The faults of the hub repository are kept on purpose, because the toolkit
has to cope with them: `tokenizer.json` has the wrong pre-tokenizer pattern (transformers issue 42299) and adds <s> by
itself, and `chat_template.json` adds a default system message with today's date.

The vocabulary is the start of a real Tekken file: 32 control tokens and the first 4,064 ranks. A cut of a ranked BPE
vocabulary is a valid one, and mistral-common and tokenizers agree on it. The file comes with mistral-common.
"""

import argparse
import json
from pathlib import Path

CONTROLS = 32  # ids below are control tokens
IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
PATCH_SIZE, MERGE_SIZE, LONGEST_EDGE = 14, 2, 1540
CONTROL_TOKENS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()

# The pattern that the hub's tokenizer.json has instead of Tekken's: it is Llama 3's.
WRONG_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Like the hub's: string content is refused in system messages, and who writes none gets one with a date.
DATED_TEMPLATE = """\
{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "You are Mistral Small 3, a Large Language Model (LLM) created by Mistral AI, a \
French startup headquartered in Paris.\\nYour knowledge base was last updated on 2023-10-01. The current date is " + \
today + "." %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'][0]['text'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = default_system_message %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' }}
        {%- for block in message['content'] %}
            {{- block['text'] if block['type'] == 'text' else '[IMG]' }}
        {%- endfor %}
        {{- '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'][0]['text'] + eos_token }}
    {%- endif %}
{%- endfor %}"""


def tiny_config():
    """A Mistral3 of 7.5 million parameters."""
    return mistral3_config(
        text=dict(
            hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=64, vocab_size=4096, max_position_embeddings=32768, rope_theta=1e6,
        ),
        vision=dict(hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=6, head_dim=32),
    )  # fmt: skip


def mistral3_config(text: dict, vision: dict):
    """A `Mistral3Config` with the given sizes and, for the rest, the values of Mistral-Small-3.1."""
    from transformers import Mistral3Config

    text = dict(
        model_type="mistral", rms_norm_eps=1e-5, hidden_act="silu", sliding_window=None, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, **text,
    )  # fmt: skip
    vision = dict(
        model_type="pixtral", patch_size=PATCH_SIZE, image_size=LONGEST_EDGE, hidden_act="silu", rope_theta=1e4,
        **vision,
    )  # fmt: skip
    return Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=10, spatial_merge_size=MERGE_SIZE,
        multimodal_projector_bias=False, vision_feature_layer=-1, projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )  # fmt: skip


def write_weights(folder: Path, config, seed: int, max_shard_size: str, device: str = "cpu") -> None:
    """Write config.json and random bf16 shards under the hub's key names."""
    import torch
    from transformers import Mistral3ForConditionalGeneration

    torch.manual_seed(seed)
    with torch.device(device):
        model = Mistral3ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    save_weights(model, folder, max_shard_size)


def save_weights(model, folder: Path, max_shard_size: str) -> None:
    """Write a model's shards, config.json and generation_config.json as they stand on the hub."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    # What the hub says. transformers mends the tokenizer only beside a config that is older than 5.0.
    version = {"transformers_version": "4.50.0.dev0"}
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | version)
    write_json(
        folder / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2} | version,
    )


def write_tokenizer(folder: Path, tekken: Path, control_tokens: int, vocab_size: int) -> None:
    """Write tekken.json (version v7) and the hub's tokenizer.json, processor and chat-template files.

    Args:
        tekken: a Tekken file to take the first ranks of.
        control_tokens: how many ids are control tokens: 32 for the embedded base, 1,000 for the real one.
        vocab_size: control tokens and ranks together.
    """
    from tokenizers import Regex, pre_tokenizers, processors
    from transformers.integrations.mistral.tokenizer import MistralConverter

    source = json.loads(tekken.read_text(encoding="utf-8"))
    names = CONTROL_TOKENS + [f"<SPECIAL_{i}>" for i in range(len(CONTROL_TOKENS), control_tokens)]
    data = {
        "config": {
            "pattern": source["config"]["pattern"],
            "num_vocab_tokens": vocab_size - control_tokens,
            "default_vocab_size": vocab_size,
            "default_num_special_tokens": control_tokens,
            "version": "v7",
        },
        "vocab": source["vocab"][: vocab_size - control_tokens],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)],
        "multimodal": {
            "image_patch_size": PATCH_SIZE,
            "max_image_size": LONGEST_EDGE,
            "spatial_merge_size": MERGE_SIZE,
        },
    }
    (folder / "tekken.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")

    tokenizer = MistralConverter(vocab_file=str(folder / "tekken.json")).converted()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WRONG_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)

    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", specials)
    write_json(
        folder / "tokenizer_config.json",
        specials
        | {
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**30,
            "processor_class": "PixtralProcessor",
            "tokenizer_class": "LlamaTokenizerFast",
        },
    )
    write_json(folder / "chat_template.json", {"chat_template": DATED_TEMPLATE})
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
            "image_mean": IMAGE_MEAN, "image_processor_type": "PixtralImageProcessorFast", "image_std": IMAGE_STD,
            "patch_size": PATCH_SIZE, "processor_class": "PixtralProcessor", "resample": 3,
            "rescale_factor": 0.00392156862745098, "size": {"longest_edge": LONGEST_EDGE},
        },
    )  # fmt: skip
    write_json(
        folder / "processor_config.json",
        {
            "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "image_token": "[IMG]",
            "patch_size": PATCH_SIZE, "processor_class": "PixtralProcessor", "spatial_merge_size": MERGE_SIZE,
        },
    )  # fmt: skip


def write_json(path: Path, data: dict) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def find_tekken() -> Path:
    """The Tekken file of Mistral-Small-3.1 that comes with mistral-common."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write")
    parser.add_argument("--tekken", type=Path, help="Tekken file to cut (default: mistral-common's)")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    write_tokenizer(args.output, args.tekken or find_tekken(), CONTROLS, vocab_size=4096)


if __name__ == "__main__":
    main()
