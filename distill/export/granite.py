"""GraniteMoeHybrid: the home of Mamba-2 students of Llama, Mistral, Qwen2, Mixtral and Granite teachers.

It is served by vLLM and SGLang. Its mixer has one B/C group for each head, so x and B are expanded from key/value heads
to query heads, and its gated norm is then one for each head, as ours is.
"""

from typing import Any, cast

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from ...students import HybridForCausalLM, Mamba2Mixer, StudentConfig
from ...students.modeling.configuration_mixers import have_trans_points, is_attention
from ...students.modeling.projections import PROJECTIONS
from .engines import NO_ONNX, READ, REFUSES, TRIED, WRONG, Engine
from .home import (
    FOR_CONFIG,
    FOR_STUDENT,
    LLAMAS,
    Home,
    config_around,
    feed_forward_of,
    has_positions,
    mlp_of,
    state_of_appended,
    why_fixed,
    why_not_around,
)
from .verify import rounded

FAMILIES = (*LLAMAS, "mixtral", "granite", "granitemoe", "granitemoeshared")
MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
NO_SHARED = 8  # width of an MLP of zeros beside experts: the class always has one, a teacher may not
NEEDS = "5.23"  # transformers before it normalises over all heads at once: silently other logits
TITLE = "Mamba-2"
FIXED = {"rope": False, "conv_activation": "silu", "gate": True, "norm": True}
_ONE_FORM = "a layer of it is attention or Mamba-2, not one up to a TransPoint and then the other"


def why_no_student(config: StudentConfig) -> str | None:
    """Why no GraniteMoeHybrid can be a student of this config, whatever runs it."""
    if config.kind.trans_points:
        return f"{_ONE_FORM}; {FOR_CONFIG}"
    if config.mixer != "mamba2":
        return f"it holds Mamba-2 layers, and student.mixer is {config.mixer}; {FOR_CONFIG}"
    for name, what in (("window", "no sliding window"), ("shared_rank", "no projections that layers share")):
        if (config.attention_options or {}).get(f"attention_{name}") is not None:
            return f"its attention has {what}; {FOR_CONFIG}"
    return why_fixed(TITLE, config.mixer_options, FIXED, FOR_CONFIG)


def why_not(student: HybridForCausalLM) -> str | None:
    """Why no GraniteMoeHybrid can be this student, whatever runs it."""
    config, mixers = student.config, mixers_of(student)
    if have_trans_points(config.mixers):
        return f"{_ONE_FORM}; {FOR_STUDENT}"
    if reason := why_not_around(student, FAMILIES):
        return reason
    others = {kind for kind in config.mixers if kind != "mamba2" and not is_attention(kind)}
    if others or not mixers:
        return f"it holds Mamba-2 layers, not {', '.join(sorted(others or {*config.mixers}))}; {FOR_STUDENT}"
    mixer = mixers[0]
    found = {name: getattr(mixer, name) for name in ("rope", "conv_activation", "gate")}
    found |= {"norm": mixer.norm is not None, "qk_norm": mixer.q_norm is not None}
    if reason := why_fixed(TITLE, found, {**FIXED, "qk_norm": False}, FOR_STUDENT):
        return reason
    if mixer.num_heads * mixer.head_dim % config.hidden_size:
        return (
            f"its Mamba-2 width must be a multiple of the hidden size {config.hidden_size}, "
            f"and {mixer.num_heads} heads of {mixer.head_dim} are not; {FOR_STUDENT}"
        )
    attention = [module for module in student.attention_layers() if module not in mixers]
    if any(getattr(module, "q_norm", None) is not None for module in attention):
        return f"its attention has no q/k norms; {FOR_STUDENT}"
    if student.tied_mixers:
        return f"its attention has no projections that layers share; {FOR_STUDENT}"
    if len({has_positions(module) for module in attention}) > 1:
        return f"either all of its attention has positions, or none; {FOR_STUDENT}"
    return None


def mixers_of(student: HybridForCausalLM) -> list[Mamba2Mixer]:
    """Its Mamba-2 layers."""
    return [mixer for mixer in student.mixer_layers() if isinstance(mixer, Mamba2Mixer)]


def too_old() -> str | None:
    """Why this version of transformers does not run it as it is, None if it does."""
    if Version(transformers.__version__) >= Version(NEEDS):
        return None
    return (
        f"transformers {transformers.__version__} normalises all heads of a Mamba-2 layer together; "
        f"it takes {NEEDS} or later, or format custom"
    )


def config_of(student: HybridForCausalLM) -> GraniteMoeHybridConfig:
    """The GraniteMoeHybrid config that holds this student."""
    around, mixers = config_around(student), mixers_of(student)
    attention, mixer = [module for module in student.attention_layers() if module not in mixers], mixers[0]
    head_dim, heads = mixer.head_dim, mixer.num_heads
    own, experts = student.config, hasattr(feed_forward_of(student.get_decoder().layers[0]), "experts")
    return GraniteMoeHybridConfig(
        **around | {name: getattr(own, name, 1.0) for name in MULTIPLIERS},
        # Of the MLP beside experts, or the only one.
        shared_intermediate_size=(
            getattr(own, "shared_intermediate_size", 0) or NO_SHARED if experts else around["intermediate_size"]
        ),
        num_local_experts=own.num_local_experts if experts else 0,
        num_experts_per_tok=own.num_experts_per_tok if experts else 0,
        # Without a router there is none to balance, and trainers would ask it.
        router_aux_loss_coef=own.router_aux_loss_coef if experts else 0.0,
        attention_bias=any(getattr(module, name).bias is not None for module in attention for name in PROJECTIONS),
        position_embedding_type="rope" if all(map(has_positions, attention)) else "nope",
        attention_multiplier=mixer.geometry.scale,
        mamba_n_heads=heads,
        mamba_n_groups=heads,
        mamba_d_head=head_dim,
        mamba_d_state=mixer.state_size,
        mamba_d_conv=_conv(mixer).kernel_size[0],
        mamba_expand=heads * head_dim // student.config.hidden_size,
        # Changes no result. transformers' plain scan takes memory with it: one B/C group a head, and no fused kernel.
        mamba_chunk_size=64,
        mamba_conv_bias=True,
        mamba_proj_bias=any(m.z_bias is not None or m.out_proj.bias is not None for m in mixers),
    )


@torch.no_grad()
def state_of(student: HybridForCausalLM) -> dict[str, Tensor]:
    """The student's weights under GraniteMoeHybrid's names, x and B expanded to all heads."""
    config, decoder = config_of(student), student.get_decoder()
    state = {
        "model.embed_tokens.weight": decoder.embed_tokens.weight,
        "model.norm.weight": decoder.norm.weight,
        "lm_head.weight": student.get_output_embeddings().weight,
    }
    for i, (layer, mixer) in enumerate(zip(decoder.layers, student.mixer_layers(), strict=True)):
        own = {
            "input_layernorm.weight": layer.input_layernorm.weight,
            "post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
            **(_experts(layer, config) if config.num_local_experts else _mlp(layer)),
        }
        if isinstance(mixer, Mamba2Mixer):
            own |= _mixer(mixer, config)
        else:
            own |= _attention(layer.self_attn, config)
        state |= {f"model.layers.{i}.{name}": tensor for name, tensor in own.items()}
    state |= state_of_appended(GraniteMoeHybridForCausalLM, config, len(decoder.layers))
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _mlp(layer: nn.Module) -> dict[str, Tensor]:
    gate, up, down = mlp_of(layer)
    return {
        "shared_mlp.input_linear.weight": torch.cat([gate.weight, up.weight]),
        "shared_mlp.output_linear.weight": down.weight,
    }


def _experts(layer: Any, config: GraniteMoeHybridConfig) -> dict[str, Tensor]:
    block: Any = feed_forward_of(layer)
    router = block.router if hasattr(block, "router") else block.gate
    shared, width = getattr(layer, "shared_mlp", None), config.shared_intermediate_size
    inwards = torch.zeros(2 * width, config.hidden_size) if shared is None else shared.input_linear.weight
    outwards = torch.zeros(config.hidden_size, width) if shared is None else shared.output_linear.weight
    return {
        "block_sparse_moe.router.weight": router.weight,
        "block_sparse_moe.experts.gate_up_proj": block.experts.gate_up_proj,
        "block_sparse_moe.experts.down_proj": block.experts.down_proj,
        "shared_mlp.input_linear.weight": inwards,
        "shared_mlp.output_linear.weight": outwards,
    }


def _attention(attention: nn.Module, config: GraniteMoeHybridConfig) -> dict[str, Tensor]:
    own = {}
    for name in PROJECTIONS:
        linear = getattr(attention, name)
        own[f"self_attn.{name}.weight"] = linear.weight
        if config.attention_bias:  # all four or none
            own[f"self_attn.{name}.bias"] = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    return own


def _mixer(mixer: Mamba2Mixer, config: GraniteMoeHybridConfig) -> dict[str, Tensor]:
    def expanded(part: Tensor, name: str) -> Tensor:  # rows of one part: each key/value head once for each query head
        if name not in ("x", "B") or mixer.state_heads == mixer.num_heads:
            return part
        by_head = part.unflatten(0, (mixer.num_kv_heads, -1))
        return by_head.repeat_interleave(mixer.num_heads // mixer.num_kv_heads, dim=0).flatten(0, 1)

    def split(tensor: Tensor, names: str) -> Tensor:
        parts = tensor.split([mixer.sizes[name] for name in names.split()])
        return torch.cat([expanded(part, name) for part, name in zip(parts, names.split(), strict=True)])

    own = {
        "mamba.in_proj.weight": split(mixer.in_proj.weight, "z x B C dt"),
        "mamba.conv1d.weight": split(_conv(mixer).weight, "x B C"),
        "mamba.conv1d.bias": split(cast(Tensor, _conv(mixer).bias), "x B C"),
        "mamba.dt_bias": mixer.dt_bias,
        "mamba.A_log": mixer.A_log,
        "mamba.D": mixer.D,
        "mamba.norm.weight": cast(Tensor, cast(nn.Module, mixer.norm).weight),
        "mamba.out_proj.weight": mixer.out_proj.weight,
    }
    if config.mamba_proj_bias:  # both or none
        for name, held in (("in_proj", mixer.z_bias), ("out_proj", mixer.out_proj.bias)):
            weight = own[f"mamba.{name}.weight"]
            bias = own[f"mamba.{name}.bias"] = weight.new_zeros(len(weight))
            if held is not None:
                bias[: len(held)] = held  # z comes first
    return own


def _conv(mixer: Mamba2Mixer) -> nn.Conv1d:
    """Mamba-2 always has one."""
    return cast(nn.Conv1d, mixer.conv1d)


def _to_config(written: dict) -> dict:
    """llama.cpp's converter matches the older names, which transformers maps."""
    return {"layer_types": ["mamba" if t == "linear_attention" else "attention" for t in written["layer_types"]]}


def engines_of(student: HybridForCausalLM) -> tuple[Engine, ...]:
    config = student.config
    mixer, lacks = mixers_of(student)[0], None
    tried = TRIED if all(map(has_positions, student.attention_layers())) else READ
    if mixer.num_heads * mixer.head_dim != config.hidden_size:
        lacks = "heads are of another size than it takes them to be; the format custom and plugins/vllm serve it"
    elif not 2 <= (taps := _conv(mixer).kernel_size[0]) <= 4:
        lacks = f"its convolution takes 2 to 4 taps, not {taps}"
    one_norm = "it norms all heads of a Mamba-2 layer together"
    return (
        Engine("vLLM 0.32", tried) if lacks is None else Engine("vLLM 0.32", REFUSES, lacks),
        Engine("SGLang 0.5.23", READ),
        Engine("llama.cpp", REFUSES, "its converter takes wider layers only; the format gguf is for it"),
        Engine("mistral.rs 0.9.2", WRONG, one_norm),
        Engine("MLX-lm 0.32.0", WRONG, f"{one_norm}, once its `time_step_limit` is edited so that it loads"),
        NO_ONNX,
    )


GRANITE = Home(
    model=GraniteMoeHybridForCausalLM,
    why_no_student=lambda config: why_no_student(config) or too_old(),
    why_not=lambda student: why_not(student) or too_old(),
    config=config_of,
    state=lambda student, dtype: rounded(student, dtype, state_of(student)),
    otherwise=_to_config,
    engines=engines_of,
    note=(
        "It is a GraniteMoeHybrid model: no remote code, transformers "
        f"{NEEDS} or later (earlier versions normalise\nover all heads at once and silently give other logits)."
    ),
)
