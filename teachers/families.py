"""How the attention of a family is read where it is not as most families have it.

`read_attention` takes what is usual; a reader here says where the parts lie instead. It cannot be wrong in silence:
`attention_view` computes what it describes and compares that with the module.
"""

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from .attention import AttentionView, Projection, Rows, read_attention

ATTENTION = ("self_attn", "attention")  # what a decoder layer calls its attention

Reader = Callable[[PreTrainedModel, int, nn.Module, str], AttentionView]


def phi3(model, index, module, name) -> AttentionView:
    """Queries, keys and values are rows of one matrix, one after the other."""
    width, keys = module.o_proj.in_features, module.num_key_value_heads * module.head_dim
    starts = {"q_proj": (0, width), "k_proj": (width, keys), "v_proj": (width + keys, keys)}
    parts = {part: Projection("qkv_proj", module.qkv_proj, Rows(*rows)) for part, rows in starts.items()}
    return read_attention(model, index, module, name, **parts, o_proj=Projection("o_proj", module.o_proj))


def gpt_neox(model, index, module, name) -> AttentionView:
    """In one matrix each head has its query, key and value, one head after the other."""
    size, heads = module.head_size, module.dense.in_features // module.head_size
    parts = {
        part: Projection("query_key_value", module.query_key_value, Rows(i * size, size, 3 * size, heads))
        for i, part in enumerate(("q_proj", "k_proj", "v_proj"))
    }
    return read_attention(model, index, module, name, **parts, o_proj=Projection("dense", module.dense))


def with_output(output: str) -> Reader:
    """A reader of attention whose output projection has this name, and all else as most have it."""

    def read(model, index, module, name) -> AttentionView:
        parts = {part: Projection(part, getattr(module, part)) for part in ("q_proj", "k_proj", "v_proj")}
        parts["o_proj"] = Projection(output, getattr(module, output))
        return read_attention(model, index, module, name, **parts)

    return read


# By model type.
READERS: dict[str, Reader] = {
    "gpt_neox": gpt_neox,  # Pythia
    "phi": with_output("dense"),  # Phi-1, Phi-2
    "phi3": phi3,
}
