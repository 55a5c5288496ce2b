"""Untrained models of a family (`scratch-llama`, ...), to be trained from scratch: what a teacher is to a student, but
that it knows nothing."""

import difflib
import math

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from .attention import attention_view
from .errors import TeacherError
from .names import SCRATCH
from .random import RANDOM_FAMILIES, byte_tokenizer, check_sizes

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def untrained_teacher(name: str, seed: int = 0, **sizes) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """An untrained model of a family (`scratch-llama`), and a byte-level tokenizer without a chat template.

    Weights are normal, embeddings included, with the standard deviation 1 / sqrt(3 hidden_size): what PyTorch gives a
    linear layer, and 0.02 at a width of 768. Projections back into the residual stream are divided by the root of how
    many there are (GPT-2: Radford et al. 2019, section 2.3); biases are 0, norms 1. `config.scratch_seed` is the seed,
    by which a student of it is known to be one without a teacher.

    Args:
        name: `scratch-` and a family of `RANDOM_FAMILIES`.
        seed: of the weights; the global generator is left as it was.
        sizes: any field of the family's config. Of what is not given, heads are as many for keys as for queries,
            head_dim is hidden_size by them, and intermediate_size 8/3 of hidden_size, up to a multiple of 32.

    Raises:
        TeacherError: no such family, no such field, or values that do not go together.
    """
    family = name.removeprefix(SCRATCH)
    if family not in RANDOM_FAMILIES:
        near = difflib.get_close_matches(family, RANDOM_FAMILIES, n=1)
        raise TeacherError(
            f"no untrained model '{name}'; expected one of {', '.join(SCRATCH + known for known in RANDOM_FAMILIES)}"
            + (f"; did you mean '{SCRATCH}{near[0]}'?" if near else "")
        )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None  # it answers nothing: it goes on with a text
    check_sizes(family, sizes)
    try:
        fields = SIZES | {"vocab_size": len(tokenizer)} | sizes
        heads, width = fields["num_attention_heads"], fields["hidden_size"]
        derived = {
            "num_key_value_heads": heads,
            "head_dim": width // heads,
            "intermediate_size": 32 * math.ceil(width / 12),
            "initializer_range": (3 * width) ** -0.5,
        }
        fields = derived | fields
        if heads % fields["num_key_value_heads"]:
            raise ValueError("num_key_value_heads does not divide num_attention_heads")
        for token in ("bos", "eos", "pad"):
            fields[f"{token}_token_id"] = getattr(tokenizer, f"{token}_token_id")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
        _scale_residual(model)
    except TeacherError:
        raise
    except Exception as error:
        raise TeacherError(f"no {name} of these sizes: {' '.join(str(error).split())}") from error
    model.config.scratch_seed = seed
    return model.eval(), tokenizer


@torch.no_grad()
def _scale_residual(model: PreTrainedModel) -> None:
    """Divides what is added to the residual stream, twice a layer."""
    views = attention_view(model, check=False)
    for view, layer in zip(views, model.get_decoder().layers, strict=True):
        for weight in (view.o_proj.weight, layer.mlp.down_proj.weight):
            weight.div_(residual_factor(model.config))


def residual_factor(config: PreTrainedConfig) -> float:
    """By which a projection back into the residual stream starts smaller than others."""
    return math.sqrt(2 * config.num_hidden_layers)
