"""`custom`: any student, with its own modeling files, which need torch and transformers only."""

import copy
from pathlib import Path

import torch

from ...students import HybridConfig, HybridForCausalLM
from ...students.modeling.configuration_hybrid import AUTO_MAP
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
    snippet=_snippet,
)
