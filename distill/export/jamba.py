"""Jamba without experts: the home of Mamba-1 students that compute steps, B and C from x (`student.selection=x`).

Its Mamba-1 layer has one B and one C for all channels, made of the convolved x by one matrix and RMS-normalised. A
teacher's keys and queries are functions of the hidden state, other ones for each head, which no weights of that layer
compute: students that start from them have no home, there or in FalconMamba, whose layer is the same without weights in
the norms. Its attention has no positions (`student.attention_positions=false`), and comes in every so many layers.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import JambaConfig, JambaForCausalLM

from ...students import HybridForCausalLM, StudentConfig
from ...students.modeling.mamba1 import Mamba1Mixer
from ...students.modeling.projections import PROJECTIONS
from .engines import NO_ONNX, READ, Engine
from .home import (
    FOR_CONFIG,
    FOR_STUDENT,
    LLAMAS,
    Home,
    config_around,
    has_positions,
    mlp_of,
    state_of_appended,
    why_fixed,
    why_not_around,
)
from .verify import rounded

FAMILIES = (*LLAMAS, "qwen3")
TITLE = "Mamba-1"
FIXED = {"conv_activation": "silu", "gate": True, "norm": False}
EXACT = (".dt_proj.bias",)  # what is dt_bias here
_FROM_HIDDEN = (
    "its Mamba-1 layer makes steps, B and C of x, the same for all channels, and so none of a teacher's keys and "
    "queries: set student.selection=x, where they are learned from scratch, or"
)


def why_no_student(config: StudentConfig) -> str | None:
    """Why no Jamba can be a student of this config, whatever the teacher."""
    if config.mixer_options["selection"] != "x":
        return f"{_FROM_HIDDEN} {FOR_CONFIG}"
    return why_fixed(TITLE, config.mixer_options, FIXED, FOR_CONFIG)


def why_not(student: HybridForCausalLM) -> str | None:
    """Why no Jamba can be this student."""
    config = student.config
    if others := set(config.mixers) - {"attention", "softmax", "mamba1"}:
        return f"it holds {TITLE} layers, not {', '.join(sorted(others))}; {FOR_STUDENT}"
    mixer, attention = _mixers(student)[0], _attention_of(student)
    if not mixer.from_x:
        return f"{_FROM_HIDDEN} {FOR_STUDENT}"
    if reason := why_not_around(student, FAMILIES):
        return reason
    found = {"conv_activation": mixer.conv_activation, "gate": mixer.gate, "norm": mixer.norm is not None}
    if reason := why_fixed(TITLE, found, FIXED, FOR_STUDENT):
        return reason
    if mixer.num_heads * mixer.head_dim % config.hidden_size:
        return (
            f"its {TITLE} width must be a multiple of the hidden size {config.hidden_size}, "
            f"and {mixer.num_heads} heads of {mixer.head_dim} are not; {FOR_STUDENT}"
        )
    if any(map(has_positions, attention.values())):
        return (
            f"its attention has no positions, and that of a {config.base_model_type} has rotary ones: set "
            f"student.attention_positions=false, keep none (student.keep_attention=[]), or {FOR_STUDENT}"
        )
    if student.tied_mixers:
        return f"its attention has no projections that layers share; {FOR_STUDENT}"
    for module in attention.values():
        if module.q_norm is not None or any(getattr(module, name).bias is not None for name in PROJECTIONS):
            return f"its attention has no q/k norms and no biases; {FOR_STUDENT}"
    if attention and mixer.num_heads * mixer.head_dim != config.hidden_size:
        return f"all heads of its attention together are as wide as a hidden state; {FOR_STUDENT}"
    if attention and _period(list(attention), len(config.mixers)) is None:
        return f"its attention comes in every so many layers, and here in {list(attention)}; {FOR_STUDENT}"
    return None


def config_of(student: HybridForCausalLM) -> JambaConfig:
    """The Jamba config that holds this student."""
    around, mixers = config_around(student), _mixers(student)
    for name in ("rope_parameters", "layer_types", "head_dim"):  # vLLM's heads are of another size than it says
        del around[name]
    mixer, layers = mixers[0], len(student.config.mixers)
    # Without attention, the layer that is appended is the only one with it.
    period, offset = _period(list(_attention_of(student)), layers) or (layers + 1, layers)
    return JambaConfig(
        **around,
        attn_layer_period=period,
        attn_layer_offset=offset,
        num_experts=1,
        num_experts_per_tok=1,
        router_aux_loss_coef=0.0,
        mamba_d_state=mixer.state_size,
        mamba_d_conv=cast("nn.Conv1d", mixer.conv1d).kernel_size[0],
        mamba_expand=mixer.num_heads * mixer.head_dim // student.config.hidden_size,
        mamba_dt_rank=mixer.rank,
        mamba_conv_bias=True,
        mamba_proj_bias=any(m.z_bias is not None or m.out_proj.bias is not None for m in mixers),
    )


@torch.no_grad()
def state_of(student: HybridForCausalLM, dtype: torch.dtype) -> dict[str, Tensor]:
    """The student's weights under Jamba's names, as they are written."""
    config, decoder = config_of(student), student.get_decoder()
    state = {
        "model.embed_tokens.weight": decoder.embed_tokens.weight,
        "model.final_layernorm.weight": decoder.norm.weight,
        "lm_head.weight": student.get_output_embeddings().weight,
    }
    for i, (layer, mixer) in enumerate(zip(decoder.layers, student.mixer_layers(), strict=True)):
        own = {
            "input_layernorm.weight": layer.input_layernorm.weight,
            "pre_ff_layernorm.weight": layer.post_attention_layernorm.weight,
        }
        for name, linear in zip(("gate_proj", "up_proj", "down_proj"), mlp_of(layer), strict=True):
            own[f"feed_forward.{name}.weight"] = linear.weight
        if isinstance(mixer, Mamba1Mixer):
            own |= _mixer(mixer, config.mamba_proj_bias)
        else:
            own |= {f"self_attn.{name}.weight": getattr(layer.self_attn, name).weight for name in PROJECTIONS}
        state |= {f"model.layers.{i}.{name}": tensor for name, tensor in own.items()}
    state |= state_of_appended(JambaForCausalLM, config, len(decoder.layers))
    return rounded(student, dtype, {name: tensor.detach().cpu() for name, tensor in state.items()}, EXACT)


def _mixer(mixer: Mamba1Mixer, biases: bool) -> dict[str, Tensor]:
    z, x = mixer.in_proj.weight.split([mixer.sizes["z"], mixer.sizes["x"]])
    own = {
        "in_proj.weight": torch.cat([x, z]),
        "dt_proj.bias": mixer.dt_bias,
        "A_log": mixer.A_log.flatten(0, 1),
        "D": mixer.D,
    }
    own |= {f"{name.lower()}_layernorm.weight": getattr(mixer, f"{name}_norm").weight for name in ("dt", "B", "C")}
    names = "conv1d.weight conv1d.bias x_proj.weight dt_proj.weight out_proj.weight"
    own |= {name: mixer.get_parameter(name) for name in names.split()}
    if biases:  # both or none
        for name, held in (("in_proj", mixer.z_bias), ("out_proj", mixer.out_proj.bias)):
            weight = own[f"{name}.weight"]
            bias = own[f"{name}.bias"] = weight.new_zeros(len(weight))
            if held is not None:
                bias[len(bias) - len(held) :] = held  # z comes last
    return {f"mamba.{name}": tensor for name, tensor in own.items()}


def _mixers(student: HybridForCausalLM) -> list[Mamba1Mixer]:
    return [mixer for mixer in student.mixer_layers() if isinstance(mixer, Mamba1Mixer)]


def _attention_of(student: HybridForCausalLM) -> dict[int, Any]:
    """By layer, kept or as a mixer."""
    layers = enumerate(student.attention_layers())
    return {layer: module for layer, module in layers if not isinstance(module, Mamba1Mixer)}


def _period(attention: list[int], layers: int) -> tuple[int, int] | None:
    """Period and offset by which just these of so many layers are attention; None where there are none."""
    for period in range(1, layers + 1):
        for offset in range(period):
            if list(range(offset, layers, period)) == attention:
                return period, offset
    return None


def engines_of(student: HybridForCausalLM) -> tuple[Engine, ...]:
    return (Engine("vLLM", READ, "of earlier versions"), NO_ONNX)


JAMBA = Home(
    model=JambaForCausalLM,
    why_no_student=why_no_student,
    why_not=why_not,
    config=config_of,
    state=state_of,
    engines=engines_of,
    note="It is a Jamba model without experts (`JambaForCausalLM`): no remote code.",
)
