"""The config of an export, as vLLM wants it, and what cannot be served."""

from typing import Any

from transformers import PreTrainedConfig

MODEL_TYPE = "transpoint_hybrid"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # what is outside attention is then as in vLLM's Llama

# Of Mamba-2 layers: what exports of earlier versions leave unsaid.
DEFAULTS = {
    "conv_kernel": 4,
    "conv_activation": "silu",
    "gate": True,
    "gate_bias": True,
    "norm": True,
    "rope": False,
    "qk_norm": True,
    "expand_kv": False,
    "state_factor": 1,
    "norm_eps": 1e-5,
}


class HybridConfig(PreTrainedConfig):
    """Every field of the teacher's config and Transpoint's own; `layer_types` is by the mixers.

    vLLM keeps no states without keys and values beside them: a student without attention has `sentinel`, and one layer
    more, of attention that adds nothing.

    Raises ValueError where the student cannot be served.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        family = config_dict.get("base_model_type")
        if family not in FAMILIES:
            raise ValueError(_refusal(f"its teacher is a {family}, and has to be one of {', '.join(FAMILIES)}"))
        values = {**config_dict, "mixer_options": DEFAULTS | config_dict["mixer_options"]}
        if reason := _why_not(values):
            raise ValueError(_refusal(reason))
        values["mamba_chunk_size"] = 64  # changes no result
        values["sentinel"] = "attention" not in values["mixers"]
        values["mixers"] = values["mixers"] + ["attention"] * values["sentinel"]
        values["num_hidden_layers"] = len(values["mixers"])
        values["layer_types"] = [
            "full_attention" if mixer == "attention" else "linear_attention" for mixer in values["mixers"]
        ]
        return super().from_dict(values, **kwargs)


def _refusal(reason: str) -> str:
    return f"transpoint-vllm cannot serve this student: {reason}"


def _why_not(values: dict[str, Any]) -> str | None:
    mixers, options, geometry = values["mixers"], values["mixer_options"], values.get("geometry")
    if others := set(mixers) - {"attention", "mamba2"}:
        return f"it has layers of {', '.join(sorted(others))}, and serves attention and mamba2"
    if "mamba2" not in mixers:
        return "none of its layers is mamba2: serve its teacher"
    if geometry is None:
        return "its config has no geometry: export it again with this version of Transpoint"
    if options["rope"]:
        return "its B and C take positions (student.rope must be false)"
    if not options["gate"]:
        return "its Mamba-2 layers have no gate (student.gate must be true)"
    if not 2 <= options["conv_kernel"] <= 4:
        return f"its convolution has {options['conv_kernel']} taps (student.conv_kernel must be 2 to 4)"
    if values["hidden_act"] != "silu":
        return f"its MLP has {values['hidden_act']}, and must have silu"
    for layer, mixer in enumerate(mixers):
        window = geometry.get("layers", {}).get(str(layer), geometry).get("window", geometry["window"])
        if mixer == "attention" and window is not None and window < values["max_position_embeddings"]:
            return f"the attention of layer {layer} has a window of {window} tokens, and must have none"
    return None
