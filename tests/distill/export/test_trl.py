"""SFT and DPO by TRL, as the guide has them, on exports and on a student in memory."""

import json
import re

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from run_files import ROOT
from transpoint.distill.export.write import export
from transpoint.students import HybridForCausalLM, StudentConfig, build_student
from transpoint.teachers.random import random_teacher

pytest.importorskip("trl", reason="needs TRL: pip install 'transpoint[trl]'")
# What TRL and transformers say to each other.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:'pin_memory'")]
GUIDE = (ROOT / "docs" / "guide" / "last-stages.md").read_text(encoding="utf-8")
REMOTE = '"trust_remote_code": True'


def snippet():
    """The code in the guide that trains with TRL."""
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "from trl" in code)
    return code


def turn(role, text):
    return [{"role": role, "content": text}]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the files that the guide reads: three steps of either kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    prompts = [{"prompt": turn("user", f"What is {i}?")} for i in range(24)]
    answers = [turn("assistant", f"It is {i}.") for i in range(24)]
    chats = [row | {"completion": answer} for row, answer in zip(prompts, answers, strict=True)]
    pairs = [
        row | {"chosen": answer, "rejected": turn("assistant", "No.")}
        for row, answer in zip(prompts, answers, strict=True)
    ]
    for name, rows in {"chats": chats, "pairs": pairs}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def student_of(**options):
    teacher, tokenizer = random_teacher("random-llama")
    return build_student(teacher, StudentConfig(**{"keep_attention": [1, 3], **options})), tokenizer


def check(trainer, before, load):
    """A training of TRL's came through, changed mixers and kept attention, and what it saved is what it has."""
    assert trainer.state.global_step == 3
    figures = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    assert len(figures) == 1 and 0 < figures[0] < float("inf")
    model, ids = trainer.model.eval().cpu(), torch.arange(5, 45).view(2, 20)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    names = dict(before.named_parameters())
    assert {name for name in names if ".layers.0." in name or ".layers.1." in name} <= changed
    loaded = load(trainer.args.output_dir)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    return loaded


@pytest.mark.parametrize("format", ["native", "custom"])
def test_the_guide_trains_an_export(format, here, unverified):
    options = {} if format == "native" else {"mixer": "transmamba", "trans_points": 8}
    export(*student_of(**options), f"runs/mine/export/{format}", format=format)
    code, remote = snippet(), format == "custom"
    assert "runs/mine/export/native" in code and f"# {REMOTE} for a custom export" in code
    if remote:
        code = code.replace("export/native", "export/custom").replace("common = {", f"common = {{{REMOTE}, ")
    scope = {}
    exec(code, scope)

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote)

    tuned = check(scope["sft"], load(f"runs/mine/export/{format}"), load)
    check(scope["dpo"], tuned, load)


def test_a_student_in_memory(here):
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    student, tokenizer = student_of()
    student.save_pretrained("student")
    common = {"num_train_epochs": 1, "bf16": torch.cuda.is_available(), "learning_rate": 1e-5}
    chats, pairs = (datasets.Dataset.from_json(f"{name}.jsonl") for name in ("chats", "pairs"))
    sft = SFTTrainer(student, args=SFTConfig("sft", **common), train_dataset=chats, processing_class=tokenizer)
    sft.train()
    sft.save_model()
    tuned = check(sft, HybridForCausalLM.from_pretrained("student"), HybridForCausalLM.from_pretrained)
    models = {"model": sft.model.train(), "ref_model": HybridForCausalLM.from_pretrained("sft")}
    dpo = DPOTrainer(**models, args=DPOConfig("dpo", **common), train_dataset=pairs, processing_class=tokenizer)
    dpo.train()
    dpo.save_model()
    check(dpo, tuned, HybridForCausalLM.from_pretrained)
