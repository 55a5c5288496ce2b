"""What a home is: a class of plain transformers that holds students of one kind of mixer exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...students import HybridForCausalLM, StudentConfig
from ...students.modeling.configuration_mixers import is_attention
from ...students.modeling.softmax_attention import SoftmaxMixer
from .engines import Engine
from .verify import Weights

# Families whose arithmetic outside attention is a Llama's.
LLAMAS = ("llama", "mistral", "qwen2", "smollm3", "seed_oss", "exaone", "internlm3", "iquestcoder")
FOR_CONFIG, FOR_STUDENT = "use export.format=custom", "use format custom"  # what can be done instead


@dataclass(frozen=True)
class Home:
    """A class that students go out in, without code of their own.

    Attributes:
        model: the class.
        why_no_student, why_not: as in `Format`.
        config: takes a student; the config of the class that holds it.
        state: takes a student and the dtype of weights; these as they are written, by the names they have in the class.
        engines: as in `Format`.
        note: what the card says of it, in Markdown.
        otherwise: takes what transformers writes as config.json; what of it is written otherwise, for other engines.
        weights: takes a student and the dtype; its weights, laid out as the class wants them, as they are written, by
            the student's own names: they make the same student. None where they are its own, rounded.
    """

    model: type[PreTrainedModel]
    why_no_student: Callable[[StudentConfig], str | None]
    why_not: Callable[[HybridForCausalLM], str | None]
    config: Callable[[HybridForCausalLM], PreTrainedConfig]
    state: Callable[[HybridForCausalLM, torch.dtype], dict[str, Tensor]]
    engines: Callable[[HybridForCausalLM], tuple[Engine, ...]]
    note: str
    otherwise: Callable[[dict], dict] = lambda written: {}
    weights: Weights | None = None


def why_fixed(title: str, found: dict, wanted: dict, remedy: str) -> str | None:
    """Which options of a mixer are not as its home has them; None if all are. `found`: those of a student, by name."""
    lacking = [
        f"student.{name} (must be {str(value).lower()})" for name, value in wanted.items() if found[name] != value
    ]
    return f"its {title} layer is fixed in {', '.join(lacking)}; {remedy}" if lacking else None


def why_not_around(student: HybridForCausalLM, families: tuple[str, ...]) -> str | None:
    """Why a class whose layers are those of a Llama but for what mixes tokens cannot hold the rest of a student.

    families: of teachers, whose arithmetic outside attention is that.
    """
    config = student.config
    if config.base_model_type not in families:
        return f"it holds what {', '.join(families)} have, not {config.base_model_type}; {FOR_STUDENT}"
    if config.hidden_act != "silu":
        return f"its activation is silu throughout, not {config.hidden_act}; {FOR_STUDENT}"
    windows = {getattr(config, "sliding_window", None)} if "attention" in config.mixers else set()
    windows |= {mixer.window for mixer in student.mixer_layers() if isinstance(mixer, SoftmaxMixer)}
    if narrow := [window for window in windows if window is not None and window < config.max_position_embeddings]:
        return f"its attention has no sliding window ({min(narrow)} tokens here); {FOR_STUDENT}"
    parts = [feed_forward_of(layer) for layer in student.get_decoder().layers]
    if any(name.endswith("bias") for part in parts for name, _ in part.named_parameters()):
        return f"its MLP has no biases; {FOR_STUDENT}"
    return None


def config_around(student: HybridForCausalLM) -> dict[str, Any]:
    """The settings that configs of such classes have in common."""
    config = student.config
    mixer: Any = next(mixer for mixer in student.mixer_layers() if mixer is not None)
    types = ["full_attention" if is_attention(m) else "linear_attention" for m in config.mixers]
    if "full_attention" not in types:  # transformers cannot run them so: a layer that adds nothing is appended
        types.append("full_attention")
    names = "vocab_size hidden_size intermediate_size hidden_act max_position_embeddings initializer_range rms_norm_eps"
    names += " tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    return {name: getattr(config, name) for name in names.split()} | {
        "layer_types": types,
        "num_hidden_layers": len(types),
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "rope_parameters": dict(config.rope_parameters),
    }


def state_of_appended(model: type[PreTrainedModel], config: PreTrainedConfig, layers: int) -> dict[str, Tensor]:
    """The weights of layers that a config has after so many, all zeros: attention and MLP project to nothing, and the
    residual stream passes unchanged."""
    with torch.device("meta"):
        shapes = model(config).state_dict()
    appended = tuple(f"model.layers.{i}." for i in range(layers, config.num_hidden_layers))
    return {name: torch.zeros(t.shape) for name, t in shapes.items() if name.startswith(appended)} if appended else {}


def has_positions(attention: nn.Module) -> bool:
    """Whether an attention, kept or as a mixer, has a rotary embedding."""
    if isinstance(attention, SoftmaxMixer):
        return attention.positions and attention.geometry.rotary_dim > 0
    return bool(getattr(attention, "use_rope", True))  # SmolLM3 has layers without


def feed_forward_of(layer: Any) -> nn.Module:
    """What comes after attention in a layer: an MLP, or experts with their router."""
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def mlp_of(layer: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The projections of a layer's MLP: of gate, up and down."""
    mlp: Any = layer.mlp
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj
