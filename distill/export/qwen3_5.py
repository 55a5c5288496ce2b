"""Qwen3.5, the language model: the home of gated DeltaNet students, of Qwen3 teachers also with attention kept.

vLLM serves it, where Qwen3-Next, the same arithmetic, has to have experts. Its attention norms each head's queries and
keys, and so holds that of Qwen3 and not that of Llama, Mistral and Qwen2. OLMo-2 and -3 have no home: before a gated
DeltaNet layer OlmoHybrid norms what comes in, which these teachers' layers do not.

Its norms have weights 1 + w, and one for all heads of a gated DeltaNet layer. With 16 bits small weights would lose too
much by that, so norms' weights are multiplied into the matrices that read what is normed; those that no matrix reads
directly are written in float32.
"""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from ...students import HybridForCausalLM, StudentConfig
from ...students.modeling.gated_delta import GatedDeltaMixer
from .engines import NO_ONNX, READ, REFUSES, TRIED, Engine
from .home import FOR_CONFIG, FOR_STUDENT, LLAMAS, Home, config_around, state_of_appended, why_fixed, why_not_around
from .verify import rounded

FAMILIES = (*LLAMAS, "qwen3")
TITLE = "gated DeltaNet"
FIXED = {"rope": False, "conv_activation": "silu", "gate": True, "gate_bias": False}
EXACT = (".norm.weight", ".q_norm.weight", ".k_norm.weight")


def why_no_student(config: StudentConfig) -> str | None:
    """Why no Qwen3.5 can be a student of this config, whatever the teacher."""
    if config.attention_options is not None:
        return f"its attention is the teacher's, without a window and with positions; {FOR_CONFIG}"
    return why_fixed(TITLE, config.mixer_options, FIXED, FOR_CONFIG)


def why_not(student: HybridForCausalLM) -> str | None:
    """Why no Qwen3.5 can be this student."""
    config, mixers = student.config, student.mixer_layers()
    if others := set(config.mixers) - {"attention", "gdn"}:
        return f"it holds {TITLE} layers, not {', '.join(sorted(others))}; {FOR_STUDENT}"
    if reason := why_not_around(student, FAMILIES):
        return reason
    mixer: Any = next(mixer for mixer in mixers if mixer is not None)
    found = {name: getattr(mixer, name) for name in ("rope", "conv_activation", "gate")}
    found |= {"gate_bias": mixer.b_bias is not None, "qk_norm": mixer.q_norm is not None}
    if reason := why_fixed(TITLE, found, {**FIXED, "qk_norm": False}, FOR_STUDENT):
        return reason
    geometries = [student.geometry(i) for i in range(len(mixers))]
    if biased := sorted({name for geometry in geometries for name in geometry.biases}):
        return f"its layers have no biases, and the teacher's {', '.join(biased)} have; {FOR_STUDENT}"
    if any(mixer is None and geometry.norm_over != "head" for mixer, geometry in zip(mixers, geometries, strict=True)):
        return (
            f"its attention norms queries and keys, which that of a {config.base_model_type} does not: keep none "
            f"(student.keep_attention=[]), or {FOR_STUDENT}"
        )
    return None


def config_of(student: HybridForCausalLM) -> Qwen3_5TextConfig:
    """The Qwen3.5 config that holds this student."""
    around = config_around(student)
    mixer = cast(GatedDeltaMixer, next(mixer for mixer in student.mixer_layers() if mixer is not None))
    around["rope_parameters"]["partial_rotary_factor"] = 1.0
    return Qwen3_5TextConfig(
        **around,
        linear_conv_kernel_dim=cast("torch.nn.Conv1d", mixer.conv1d).kernel_size[0],
        linear_num_key_heads=mixer.num_heads,
        linear_num_value_heads=mixer.num_heads,
        linear_key_head_dim=mixer.head_dim,
        linear_value_head_dim=mixer.head_dim,
    )


@torch.no_grad()
def weights_of(student: HybridForCausalLM, dtype: torch.dtype) -> dict[str, Tensor]:
    """The student's weights, rounded to a dtype, those of norms multiplied into what reads them."""
    state = {name: tensor.cpu() for name, tensor in student.state_dict().items()}

    def fold(norm: str, *matrices: str) -> None:
        scale = state[norm].float()
        state[norm] = torch.ones_like(scale)
        for matrix in matrices:
            state[matrix] = state[matrix].float() * scale

    for i, mixer in enumerate(student.mixer_layers()):
        layer = f"model.layers.{i}"
        reads = ("q_proj", "k_proj", "v_proj") if mixer is None else ("in_proj",)
        fold(f"{layer}.input_layernorm.weight", *(f"{layer}.self_attn.{name}.weight" for name in reads))
        fold(f"{layer}.post_attention_layernorm.weight", f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight")
        if mixer is not None:
            fold(f"{layer}.self_attn.norm.weight", f"{layer}.self_attn.out_proj.weight")
    if not student.config.tie_word_embeddings:
        fold("model.norm.weight", "lm_head.weight")
    return rounded(student, dtype, state, EXACT)


@torch.no_grad()
def state_of(student: HybridForCausalLM, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same under Qwen3.5's names."""
    config, given, state = config_of(student), weights_of(student, dtype), {}
    for name, tensor in given.items():
        if not name.startswith("model.layers.") or ".self_attn." not in name:
            state[name] = tensor - 1 if name.endswith("norm.weight") else tensor
    for i, mixer in enumerate(student.mixer_layers()):
        layer = f"model.layers.{i}."
        held = f"{layer}self_attn."
        own = {name.removeprefix(held): tensor for name, tensor in given.items() if name.startswith(held)}
        made = _attention(own, config.head_dim) if mixer is None else _mixer(own, cast(GatedDeltaMixer, mixer))
        state |= {layer + name: tensor for name, tensor in made.items()}
    appended = state_of_appended(Qwen3_5ForCausalLM, config, len(student.config.mixers))
    return state | rounded(student, dtype, appended, EXACT)


def _attention(own: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """Of each head, the gate's rows come after the query's. Zeros: it is half open, whatever the token."""
    query = own["q_proj.weight"].unflatten(0, (-1, head_dim))
    own |= {name: own[name] - 1 for name in ("q_norm.weight", "k_norm.weight")}
    own["q_proj.weight"] = torch.cat((query, torch.zeros_like(query)), 1).flatten(0, 1)
    own["o_proj.weight"] = 2 * own["o_proj.weight"]
    return {f"self_attn.{name}": tensor for name, tensor in own.items()}


def _mixer(own: dict[str, Tensor], mixer: GatedDeltaMixer) -> dict[str, Tensor]:
    parts = dict(zip(mixer.sizes, own.pop("in_proj.weight").split([*mixer.sizes.values()]), strict=True))
    v, k, q = own["conv1d.weight"].chunk(3)
    own |= {"conv1d.weight": torch.cat((q, k, v)), "norm.weight": own["norm.weight"][: mixer.head_dim]}
    own["in_proj_qkv.weight"] = torch.cat([parts[name] for name in "qkv"])
    own |= {f"in_proj_{name}.weight": parts[name] for name in "zab"}
    return {f"linear_attn.{name}": tensor for name, tensor in own.items()}


def engines_of(student: HybridForCausalLM) -> tuple[Engine, ...]:
    regular = _interval(cast("list[str]", config_of(student).layer_types)) is not None
    return (
        Engine("vLLM 0.32", TRIED, "with torchvision; on a CPU in bfloat16, with heads of 64 or 128"),
        Engine("SGLang 0.5.23", READ)
        if regular
        else Engine("SGLang 0.5.23", REFUSES, "it takes attention at regular intervals, as every fourth layer"),
        Engine("llama.cpp", READ, "by `convert_hf_to_gguf.py --no-mtp` of September 2026 or later"),
        Engine("mistral.rs 0.9.2", REFUSES, "it wants a rotary embedding in three parts (`mrope_section`)"),
        Engine("MLX-lm 0.32.0", REFUSES, "it has no type for the language model alone"),
        NO_ONNX,
    )


def _interval(types: list[str]) -> int | None:
    """k where every k-th layer, and no other, is attention."""
    k = types.index("full_attention") + 1
    regular = [(i + 1) % k == 0 for i in range(len(types))] == [kind == "full_attention" for kind in types]
    return k if regular else None


def _to_config(written: dict) -> dict:
    """SGLang reads these at the top level alone, and rightly does not load what has no interval."""
    interval = _interval(written["layer_types"])
    return {"partial_rotary_factor": 1.0} | ({} if interval is None else {"full_attention_interval": interval})


QWEN3_5 = Home(
    model=Qwen3_5ForCausalLM,
    why_no_student=why_no_student,
    why_not=why_not,
    config=config_of,
    state=state_of,
    weights=weights_of,
    otherwise=_to_config,
    engines=engines_of,
    note="It is a Qwen3.5 language model (`Qwen3_5ForCausalLM`): no remote code.",
)
