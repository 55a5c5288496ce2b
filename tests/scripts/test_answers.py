"""The same question in three programs."""

import pytest
from decoding import stirred

from families import tiny_teacher
from merges import tokenizer_with
from transpoint.distill.export.write import export
from transpoint.students import StudentConfig, build_student
from vllm_beside import PYTHON, needs_vllm

pytestmark = [pytest.mark.servers, needs_vllm]
SIZES = {"vocab_size": len(tokenizer_with()) + 3, "hidden_size": 128}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


def exported(folder, seed):
    teacher = tiny_teacher("llama", **SIZES, **HEADS)
    student = stirred(build_student(teacher, StudentConfig(keep_attention=[1, 3])), seed)
    for format in ("native", "gguf"):
        export(student, tokenizer_with(), folder / format, format)
    return [str(folder / format) for format in ("native", "gguf")]


def test_answers_stand_side_by_side_and_differ_only_between_students(load_script, tmp_path, capsys):
    script = load_script("answers")
    native, gguf = exported(tmp_path / "one", 0)
    assert script.main([native, gguf, "What?", "--tokens", "4", "--vllm", str(PYTHON)]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("["))
    assert list(said) == ["transformers", "vLLM", "llama.cpp"] and len(set(said.values())) == 1 and said["vLLM"]
    _, other = exported(tmp_path / "other", 1)
    assert script.main([native, other, "What?", "--tokens", "4", "--vllm", "none"]) == 1
    assert "vLLM: left out" in capsys.readouterr().out
