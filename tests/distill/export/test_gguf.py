"""Exports to GGUF: what llama.cpp makes of the file is what was trained, and what it cannot hold is refused."""

import dataclasses
import importlib.util

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from distinct import distinct_student
from merges import tokenizer_with
from run_files import done
from transpoint.distill.export import gguf, granite
from transpoint.distill.export.formats import FORMATS, ExportError
from transpoint.distill.export.write import export, is_export
from transpoint.students import StudentConfig
from transpoint.teachers.random import byte_tokenizer, random_teacher

llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install 'transpoint[gguf]'"
)


@pytest.fixture
def installed(monkeypatch):
    """Whatever is refused is refused for another reason than that llama.cpp is not installed."""
    monkeypatch.setattr(gguf, "_no_llama_cpp", lambda: None)


def sentencepiece_like():
    """Merges of characters, spaces as marks, bytes for what is not in the vocabulary: as Llama 2 has it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁theabn"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "n")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    return made


def make(options=None, **given):
    return distinct_student(options=options, **{"vocab_size": len(tokenizer_with()) + 3, **given})


STUDENTS = {
    "llama": {},
    "llama-no-attention-untied": {"keep": [], "tie_word_embeddings": False},
    "llama-wide-conv2": {"head_dim": 32, "options": {"conv_kernel": 2}},
    "llama-three-heads": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
    "mistral-own-heads-large-state": {
        "family": "mistral",
        "sliding_window": None,
        "options": {"expand_kv": True, "state_factor": 2},
    },
    "qwen2": {"family": "qwen2"},
    "granite-experts": {
        "model_type": "granitemoeshared",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.25,
    },
    "mixtral": {"model_type": "mixtral", "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.slow
@llama_cpp
@pytest.mark.parametrize("case", STUDENTS)
def test_it_is_the_student_in_llama_cpp(case, tmp_path):
    student = make(**STUDENTS[case])
    figures = export(student, tokenizer_with(), tmp_path / "out", "gguf")
    assert 0 < figures["logits"] < 1e-4 * figures["scale"] and 0 < figures["decode"] < 1e-4 * figures["scale"]
    assert figures["scale"] > 2
    assert is_export(tmp_path / "out") and (tmp_path / "out" / gguf.FILE).stat().st_size > 1e5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: llama.cpp" in card and "Loaded in a fresh process with llama.cpp alone" in card


ROPES = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0},
}


@pytest.mark.slow
@llama_cpp
@pytest.mark.parametrize("kind", ROPES)
def test_a_scaled_rotary_embedding_is_itself_in_llama_cpp(kind, tmp_path):
    """At 212 positions, at which another one is quite another model."""
    scaled, plain = (
        make(num_hidden_layers=2, keep=[1], rope_parameters={"rope_theta": 1e4} | rope)
        for rope in ({"rope_type": kind} | ROPES[kind], {"rope_type": "default"})
    )
    figures = export(scaled, tokenizer_with(), tmp_path / "out", "gguf")
    ids = torch.arange(212)[None] % 250 + 3
    with torch.no_grad():
        apart = (scaled(ids).logits - plain(ids).logits)[:, -1].abs().max().item()
    assert apart > 0.02 * figures["scale"] > 200 * max(figures["logits"], figures["decode"])


@pytest.mark.slow
@llama_cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_the_student_as_far_as_llama_cpp_rounds(dtype, tmp_path):
    figures = export(make(), tokenizer_with(), tmp_path / "out", "gguf", dtype)
    assert 1e-4 < figures["decode"] / figures["scale"] < 5e-2 and figures["kl"] < 1e-2


@llama_cpp
def test_eight_bits_cost_a_little_and_that_is_said(tmp_path):
    """The MLP's rows do not go into blocks."""
    figures = export(
        make(num_hidden_layers=2, keep=[1], intermediate_size=72), tokenizer_with(), tmp_path, "gguf", "q8_0"
    )
    assert 0 < figures["logits"] < 1e-4 * figures["scale"] and abs(figures["kl"]) < 1e-6 < figures["q8_0"] < 0.05
    assert f"quantised: q8_0 costs {figures['q8_0']:.4f} nats" in (tmp_path / "README.md").read_text()
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / gguf.FILE).tensors}
    eight = {"token_embd.weight"}
    eight |= {f"blk.{name}.weight" for name in ("0.ssm_in", "0.ssm_out", "1.attn_q", "1.attn_k", "1.attn_v")}
    eight |= {f"blk.{name}.weight" for name in ("1.attn_output", "0.ffn_gate", "0.ffn_up", "1.ffn_gate", "1.ffn_up")}
    assert {name for name, kind in kinds.items() if kind == "Q8_0"} == eight
    assert {name for name, kind in kinds.items() if kind == "F16"} == {f"blk.{i}.ffn_down.weight" for i in (0, 1)}
    assert set(kinds.values()) == {"F32", "F16", "Q8_0"}


@pytest.mark.parametrize("cost", [0.25, float("nan")])
def test_eight_bits_that_cost_too_much_are_refused(cost, tmp_path, monkeypatch, installed):
    monkeypatch.setattr(gguf, "_compare", lambda *args: {"kl": cost})
    with pytest.raises(
        ExportError, match=f"^in q8_0 the student is another one in llama.cpp: that costs {cost:.3f} nats"
    ):
        export(make(num_hidden_layers=2, keep=[1]), tokenizer_with(), tmp_path / "out", "gguf", "q8_0")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@llama_cpp
def test_a_run_ends_with_a_file_for_llama_cpp(tmp_path, run_tiny):
    teacher, _ = random_teacher("random-llama", vocab_size=len(tokenizer_with()))
    for part in (teacher, tokenizer_with()):
        part.save_pretrained(tmp_path / "teacher")
    settings = ["export.format=gguf", "evaluate.recall=[]", "align.steps=10"]
    said = run_tiny(tmp_path / "run", f"teacher.source={tmp_path / 'teacher'}", *settings)
    folder = tmp_path / "run" / "export" / "gguf"
    assert f"export: {folder} loads without Transpoint" in said and (folder / gguf.FILE).is_file()
    evaluated = done(tmp_path / "run", "evaluate")
    assert evaluated["quality"] == done(tmp_path / "run", "distill")["quality"]
    assert "Beside its teacher" in (folder / "README.md").read_text()


@llama_cpp
def test_another_model_is_refused(tmp_path, monkeypatch):
    """With the half of a layer's skip, say: a wrong reading of one small part shows."""
    real = granite.state_of

    def wrong(student):
        state = real(student)
        return state | {name: tensor / 2 for name, tensor in state.items() if name == "model.layers.2.mamba.D"}

    monkeypatch.setattr(granite, "state_of", wrong)
    with pytest.raises(ExportError, match="is not equal to the student in llama.cpp: log-probabilities differ by"):
        export(make(), tokenizer_with(), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


@llama_cpp
def test_a_file_that_llama_cpp_does_not_load_is_refused_in_one_line(tmp_path):
    (tmp_path / gguf.FILE).write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ExportError, match="^what was written does not load in llama.cpp: .+$"):
        gguf._in_llama_cpp(tmp_path / gguf.FILE, tokenizer_with(), [])


# Tokenizers

LLAMA3, QWEN2 = gguf._SPLITS


def split_by(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    rest = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, rest]}


DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


@llama_cpp
@pytest.mark.parametrize(
    "tokenizer",
    [
        tokenizer_with(pre_tokenizer=DIGITS),
        tokenizer_with(pre_tokenizer=split_by(LLAMA3)),
        tokenizer_with(pre_tokenizer=split_by(QWEN2), normalizer={"type": "NFC"}),
        sentencepiece_like(),
    ],
    ids=["smollm", "llama-3", "qwen2", "llama-2"],
)
def test_tokenizers_are_themselves_in_llama_cpp(tokenizer):
    gguf.check_tokenizer(make(vocab_size=300), tokenizer)


@llama_cpp
def test_a_tokenizer_that_would_be_another_is_refused():
    other = tokenizer_with(normalizer={"type": "Lowercase"})
    with pytest.raises(ExportError, match="the tokenizer is another one in llama.cpp, of 'The capital of France"):
        gguf.check_tokenizer(make(), other)


@pytest.mark.parametrize(
    "tokenizer, reason",
    [
        (byte_tokenizer(), "it holds BPE with merges, not BPE without"),
        (tokenizer_with(pre_tokenizer={"type": "Whitespace"}), r"how it splits text \(Whitespace\) has no name"),
        (tokenizer_with(pre_tokenizer=None), r"how it splits text \(not at all\) has no name"),
    ],
)
def test_a_tokenizer_without_a_like_is_refused(tokenizer, reason):
    with pytest.raises(ExportError, match=f"^gguf cannot hold this tokenizer: {reason}.*; use another format$"):
        gguf.check_tokenizer(make(), tokenizer)


# What it cannot hold


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"gate_bias": True}, "its Mamba-2 layer has no bias in the gate; set student.gate_bias=false"),
        ({"rope": True}, "student.rope"),
        ({"attention_positions": False}, "its attention is the teacher's, positions included"),
        ({"mixer": "transmamba"}, "a layer of it is attention or Mamba-2"),
    ],
)
def test_students_are_refused_before_there_is_one(config, reason, installed):
    assert reason in gguf.why_no_student(StudentConfig(**config))
    assert gguf.why_no_student(StudentConfig()) is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"options": {"gate_bias": True}}, "no bias in the gate; make the student with student.gate_bias=false"),
        ({"attention_bias": True}, "no bias in the output projection"),
        ({"head_dim": 48}, "into which 4 heads of 48 do not go"),
        ({"family": "qwen2", "head_dim": 32}, "only where all heads are as wide as a hidden state"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            r"not scaled as here (dynamic)",
        ),
        ({"family": "qwen3"}, "not qwen3"),
        ({"options": {"attention_positions": False}}, "its attention is the teacher's, positions included"),
    ],
)
def test_students_are_refused(changes, reason, installed):
    assert reason in gguf.why_not(make(**changes))


def test_eight_bits_are_refused(installed, tmp_path):
    student = make(hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
    with pytest.raises(ExportError, match="32 weights of a row together, into which a hidden state of 48 does not go"):
        export(student, tokenizer_with(), tmp_path / "out", "gguf", "q8_0")
    with pytest.raises(ExportError, match="^native cannot .* in float32, float16, bfloat16, not in q8_0; use one of"):
        export(student, tokenizer_with(), tmp_path / "out", "native", "q8_0")


def test_without_llama_cpp_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = "what is written is checked in llama.cpp, which is not installed: pip install 'transpoint[gguf]'"
    assert gguf.why_no_student(StudentConfig()) == reason
    with pytest.raises(ExportError, match="^gguf cannot hold this student: what is written is checked in llama.cpp"):
        export(make(), tokenizer_with(), tmp_path / "out", "gguf")


def test_a_line_in_formats_finds_it():
    assert FORMATS["gguf"] == "gguf.GGUF" and dataclasses.is_dataclass(gguf.GGUF) and not gguf.GGUF.loads
