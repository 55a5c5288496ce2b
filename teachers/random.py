"""Tiny random teachers (`random-llama`, ...): every stage runs on them in seconds, with no weights to fetch."""

import difflib

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .errors import TeacherError

# What each family has that the others lack: biases (qwen2), q/k norms and a head_dim of its own (qwen3), a sliding
# window (mistral), a layer without positions (smollm3). All have grouped key/value heads.
RANDOM_FAMILIES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "smollm3": {"model_type": "smollm3", "tie_word_embeddings": True},
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # far from uniform predictions, so that a KL has something to measure
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_teacher(name: str, seed: int = 0, **sizes) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A tiny random model of a family (`random-llama`) and a byte-level tokenizer with a chat template.

    Args:
        name: `random-` and a key of `RANDOM_FAMILIES`.
        seed: of the weights; the global generator is left as it was.
        sizes: any field of the family's config, in place of the tiny defaults.

    Raises:
        TeacherError: no such family, or no such field.
    """
    family = name.removeprefix("random-")
    if family not in RANDOM_FAMILIES:
        near = difflib.get_close_matches(family, RANDOM_FAMILIES, n=1)
        raise TeacherError(
            f"no random teacher '{name}'; expected one of {', '.join(f'random-{f}' for f in RANDOM_FAMILIES)}"
            + (f"; did you mean 'random-{near[0]}'?" if near else "")
        )
    check_sizes(family, sizes)
    tokenizer = byte_tokenizer()
    fields = {**SIZES, "vocab_size": len(tokenizer), **RANDOM_FAMILIES[family], **sizes}
    for token in ("bos", "eos", "pad"):
        fields[f"{token}_token_id"] = getattr(tokenizer, f"{token}_token_id")
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # transformers starts biases at 0 and norms at 1, which would hide mistakes with them
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(std=0.1)
                elif parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), tokenizer


def check_sizes(family: str, sizes: dict) -> None:
    """Raises TeacherError for a field that the config of a family does not have: transformers takes any."""
    family = sizes.get("model_type", family)
    config = AutoConfig.for_model(family)
    for name in sizes:
        if not hasattr(config, name) and name not in SIZES:
            near = difflib.get_close_matches(name, vars(config), n=1)
            raise TeacherError(
                f"a {family} model has no size '{name}'" + (f"; did you mean '{near[0]}'?" if near else "")
            )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with `<|im_start|>`/`<|im_end|>` as beginning and end, and a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
