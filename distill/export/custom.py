"""`custom`: any student, with its own modeling files, which need torch and transformers only."""

import copy
from pathlib import Path

import torch

from ...students import HybridConfig, HybridForCausalLM, Mamba2Mixer
from ...students.modeling.configuration_hybrid import AUTO_MAP
from .engines import REFUSES, TRIED, Engine
from .formats import Format
from .verify import check_tokenizer_with, rounded, verify


def write(student: HybridForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    student.save_pretrained(folder, state_dict=rounded(student, dtype))
    config = _config(student)
    config.dtype = dtype
    config.save_pretrained(folder)  # with the code


def _config(student: HybridForCausalLM) -> HybridConfig:
    config = copy.deepcopy(student.config)
    config.auto_map = AUTO_MAP
    return config


def _snippet(path: str) -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{path}", trust_remote_code=True)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{path}", trust_remote_code=True)'
    )


def engines_of(student: HybridForCausalLM) -> tuple[Engine, ...]:
    lacks = _why_not_in_vllm(student)
    return (
        Engine("vLLM 0.32", REFUSES, lacks) if lacks else Engine("vLLM 0.32", TRIED, "with plugins/vllm"),
        Engine("others", REFUSES, "they run no code that comes with a model"),
    )


def _why_not_in_vllm(student: HybridForCausalLM) -> str | None:
    """As plugins/vllm itself finds out from the config."""
    config, mixers = student.config, [mixer for mixer in student.mixer_layers() if mixer is not None]
    if not (
        config.base_model_type in ("llama", "mistral", "qwen2", "qwen3")
        and config.hidden_act == "silu"
        and mixers
        and all(type(mixer) is Mamba2Mixer and mixer.gate and not mixer.rope for mixer in mixers)
    ):
        return "plugins/vllm serves Mamba-2 of llama, mistral, qwen2 and qwen3 models, gated, without positions on B, C"
    if not 2 <= config.mixer_options["conv_kernel"] <= 4:
        return "plugins/vllm serves convolutions of 2 to 4 taps"
    kept = [student.geometry(layer).window for layer, mixer in enumerate(config.mixers) if mixer == "attention"]
    if any(window is not None and window < config.max_position_embeddings for window in kept):
        return "plugins/vllm serves attention without a window"
    return None


CUSTOM = Format(
    name="custom",
    why_no_student=lambda config: None,
    why_not=lambda student: None,
    write=write,
    check=verify,
    check_tokenizer=lambda student, tokenizer: check_tokenizer_with(_config(student), tokenizer),
    note=lambda student: (
        "Its code is in this folder: `modeling_hybrid.py` and what it imports need torch and transformers only."
    ),
    engines=engines_of,
    snippet=_snippet,
)
