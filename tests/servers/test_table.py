"""docs/serving.md: which format holds the students of which teachers and mixers, and what loads them.

`TRANSPOINT_UPDATE=1 make test-servers` tries it all and writes the page; else what it says but for the figures is
compared with what the code says now.
"""

import copy
import os
import re

import pytest
import transformers
from decoding import stirred

from families import tiny_teacher
from merges import tokenizer_with
from run_files import ROOT
from transpoint.distill.export.engines import REFUSES, TRIED
from transpoint.distill.export.formats import FORMATS, find_format
from transpoint.distill.export.write import export
from transpoint.students import StudentConfig, StudentError, build_student
from vllm_beside import needs_torchvision, needs_vllm, serve

PAGE = ROOT / "docs" / "serving.md"
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2", "phi3", "gpt_neox", "granite", "mixtral"]
FAMILIES += ["qwen3_moe"]
MIXERS = {"mamba2": {}, "mamba1": {}, "gdn": {"qk_norm": False}, "window_mamba2": {}, "transmamba": {}}
WANTED = {("mamba1", "native"): {"selection": "x"}}  # what a format wants besides
IN_BFLOAT16 = "gdn"  # vLLM's kernels of it for CPUs take nothing else
SIZES = {
    "vocab_size": len(tokenizer_with()) + 3,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


def student_of(family, mixer, format, keep=(1, 3)):
    """A student, or why there is none."""
    options = MIXERS[mixer] | WANTED.get((mixer, format), {})
    return copy.deepcopy(made(family, StudentConfig(mixer=mixer, keep_attention=[*keep], **options)))


def made(family, config, known={}):  # noqa: B006 - what was made before
    key = f"{family} {config}"
    if key not in known:
        own = {"sliding_window": None} if family in ("mistral", "mixtral") else {}  # as in what was released since
        try:
            known[key] = build_student(tiny_teacher(family, **SIZES, **own), config)
        except StudentError as error:
            known[key] = str(error)
    return known[key]


class Cell:
    """A student in a format: the student, or why it is refused; then what was measured."""

    def __init__(self, family, mixer, format):
        self.names = (family, mixer, format)
        self.student = student_of(family, mixer, format)
        refused = isinstance(self.student, str)
        self.reason = self.student if refused else find_format(format).why_not(self.student)
        self.beside, self.figures = "", {}
        if self.reason and not refused:
            without = student_of(family, mixer, format, keep=())
            if not isinstance(without, str) and find_format(format).why_not(without) is None:
                self.student, self.beside, self.reason = without, " without attention", None
        self.vllm = None
        if self.reason is None and format != "gguf":
            (self.vllm,) = (e for e in find_format(format).engines(self.student) if e.name.startswith("vLLM"))


@pytest.fixture(scope="module")
def cells():
    return {(f, m, name): Cell(f, m, name) for f in FAMILIES for m in MIXERS for name in FORMATS}


@pytest.mark.servers
@pytest.mark.skipif(bool(os.environ.get("TRANSPOINT_UPDATE")), reason="it is being written")
def test_the_page_says_what_the_code_says(cells):
    def bare(text):
        return re.sub(r"\d\.\de-\d\d|transformers \d+\.\d+\.\d+", "#", text)

    for cell in cells.values():
        cell.figures = {"own": 1e-5, "vllm": 1e-5, "bfloat16": 1e-5}
    assert bare(page(cells)) == bare(PAGE.read_text()), "TRANSPOINT_UPDATE=1 make test-servers"


@pytest.mark.servers
@pytest.mark.timeout(3600)
@needs_vllm
@needs_torchvision
@pytest.mark.skipif(not os.environ.get("TRANSPOINT_UPDATE"), reason="TRANSPOINT_UPDATE=1 writes the page")
def test_all_is_tried_and_the_page_written(cells, tmp_path):
    folders = {}
    for (family, mixer, name), cell in cells.items():
        if cell.reason is None:
            folder = tmp_path / f"{family}-{mixer}-{name}"
            figures = export(stirred(cell.student), tokenizer_with(), folder, name)
            cell.figures["own"] = max(figures["logits"], figures["decode"])
            if cell.vllm is not None and cell.vllm.does == TRIED:
                folders[folder.name] = folder, "bfloat16" if mixer == IN_BFLOAT16 else "float32"
    for name, served in serve(folders, tmp_path).items():
        cell = cells[tuple(name.split("-"))]
        if cell.names[1] == IN_BFLOAT16:
            cell.figures["vllm"], cell.figures["bfloat16"] = served.assert_as_near_as_bfloat16(worst=2)
            continue
        for ids, answer in served.pairs():
            assert answer["tokens"] == served.greedy(ids, min_new_tokens=24, eos_token_id=None)
        cell.figures["vllm"] = (served.said() - served.expected()).abs().max().item()
    PAGE.write_text(page(cells))


def page(cells):
    reasons = {}

    def number(cell, reason):
        reason = reason.replace(f"not {cell.names[0]}", "not that of this teacher")
        return f"({reasons.setdefault(reason, len(reasons) + 1)})"

    def own(cell):
        return number(cell, cell.reason) if cell.reason else f"{cell.figures['own']:.1e}{cell.beside}"

    def vllm(cell):
        if cell.reason:
            return number(cell, cell.reason)
        if cell.vllm.does == TRIED:
            beside = f", {cell.figures['bfloat16']:.1e}" if cell.names[1] == IN_BFLOAT16 else ""
            return f"{cell.figures['vllm']:.1e}{beside}{cell.beside}"
        return number(cell, cell.vllm.words) if cell.vllm.does == REFUSES else f"as read{cell.beside}"

    rows = []
    for family in FAMILIES:
        for mixer in MIXERS:
            native, gguf, custom = (cells[family, mixer, name] for name in ("native", "gguf", "custom"))
            row = [family, mixer, own(native), vllm(native), own(gguf), own(custom), vllm(custom)]
            rows.append(f"| {' | '.join(row)} |")
    held = {
        "`native`, Mamba-2": cells["llama", "mamba2", "native"],
        "`native`, Mamba-1": cells["llama", "mamba1", "native"],
        "`native`, gated DeltaNet": cells["qwen3", "gdn", "native"],
        "`gguf`": cells["llama", "mamba2", "gguf"],
        "`custom`, Mamba-2": cells["llama", "mamba2", "custom"],
    }
    others = [
        f"| {title} | {engine.name} | {engine.does} | {engine.words} |"
        for title, cell in held.items()
        for engine in find_format(cell.names[2]).engines(cell.student)
    ]
    return f"""# What loads a student where

As `TRANSPOINT_UPDATE=1 make test-servers` found it with transformers {transformers.__version__}, by tiny random
students two of whose four layers keep attention (or none, where it says so), without a window, in float32 on a CPU. A
figure is the largest difference from the student: of logits in transformers, all at once and token by token; of
log-probabilities in llama.cpp and vLLM, after prompts and in the steps of greedy answers, whose tokens are the same.
vLLM runs gated DeltaNet on a CPU in bfloat16 alone: behind its difference from float32 is that of transformers' own
bfloat16. *As read*: by the code of the program, not tried. A number in brackets: refused, with the reason below.

| teacher | mixer | `native`: transformers | vLLM | `gguf`: llama.cpp | `custom`: transformers | vLLM |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

{chr(10).join(f"{i}. {reason}" for reason, i in reasons.items())}

## Other programs

What is the same was compared by running it, or reads so in the program's code. The same stands in an export's card.

| export | program | computes | |
|---|---|---|---|
{chr(10).join(others)}
"""
