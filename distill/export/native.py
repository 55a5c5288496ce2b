"""`native`: a class of plain transformers that holds the student exactly, so that it needs no remote code.

Which class is a matter of the student's mixer: `HOMES`.
"""

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ...students import HybridForCausalLM, StudentConfig
from ..run.files import write_json
from .formats import Format
from .granite import GRANITE
from .home import FOR_STUDENT, Home
from .jamba import JAMBA
from .qwen3_5 import QWEN3_5
from .verify import check_tokenizer_with, verify

HOMES = {"mamba2": GRANITE, "gdn": QWEN3_5, "mamba1": JAMBA}  # by mixer


def home_of(student: HybridForCausalLM) -> Home:
    """The home of a student, or the one that is nearest to it."""
    return next((HOMES[mixer] for mixer in student.config.mixers if mixer in HOMES), GRANITE)


def why_no_student(config: StudentConfig) -> str | None:
    """Why this format can hold no student of this config, whatever the teacher; None if it may."""
    return HOMES.get(config.mixer, GRANITE).why_no_student(config)


def why_not(student: HybridForCausalLM) -> str | None:
    """Why this format cannot hold this student; None if it can."""
    if not any(student.mixer_layers()):
        return f"the classes that hold students have layers without attention, and this one has none; {FOR_STUDENT}"
    return home_of(student).why_not(student)


def write(student: HybridForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    home = home_of(student)
    config, state = home.config(student), home.state(student, dtype)
    config.dtype = dtype
    with torch.device("meta"):
        model = home.model(config)
    model.load_state_dict(state, assign=True, strict=True)
    model.tie_weights()
    model.generation_config = student.generation_config
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    if rope := written.get("rope_parameters"):  # SGLang reads only a top-level rope_theta
        written["rope_theta"] = rope["rope_theta"]
    written |= home.otherwise(written)
    write_json(folder / "config.json", written)


def check(
    student: HybridForCausalLM, folder: Path, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, float]:
    """`verify`, with the weights as the student's home lays them out."""
    return verify(student, folder, dtype, tokenizer, home_of(student).weights)


def _snippet(path: str) -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{path}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{path}")'
    )


NATIVE = Format(
    name="native",
    why_no_student=why_no_student,
    why_not=why_not,
    write=write,
    check=check,
    check_tokenizer=lambda student, tokenizer: check_tokenizer_with(home_of(student).config(student), tokenizer),
    note=lambda student: home_of(student).note,
    engines=lambda student: home_of(student).engines(student),
    snippet=_snippet,
)
