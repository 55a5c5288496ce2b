"""What a sequence costs a teacher, and a student beside it."""

import pytest
import torch

from transpoint.distill.measure.cost import measure_cost
from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import RANDOM_FAMILIES, random_teacher

LENGTHS = [48, 192]
LAYERS, HEADS = 4, 2


@pytest.mark.stack
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", RANDOM_FAMILIES)
def test_a_teacher_holds_keys_and_values(family, dtype):
    sizes = {"sliding_window": None} if family == "mistral" else {}
    teacher = random_teacher(f"random-{family}", **sizes)[0].to(dtype)
    head_dim = 32 if family == "qwen3" else 16
    for length in LENGTHS:
        cost = measure_cost(teacher, length, tokens=2)
        assert cost.cache_bytes == LAYERS * 2 * HEADS * head_dim * length * dtype.itemsize
        assert cost.prefill_seconds > 0 and cost.decode_seconds > 0 and cost.attention is None
        assert (cost.length, cost.dtype, cost.device) == (length, str(dtype).removeprefix("torch."), "cpu")


@pytest.mark.stack
@pytest.mark.parametrize("keep", [[], [1], [0, 2]])
def test_only_layers_that_keep_attention_hold_more_of_a_longer_sequence(keep):
    teacher = random_teacher("random-llama")[0]
    student = build_student(teacher, StudentConfig(mixer="mamba2", keep_attention=keep))
    short, long = (measure_cost(student, length, tokens=2).cache_bytes for length in LENGTHS)
    assert long - short == len(keep) * 2 * HEADS * 16 * 4 * (LENGTHS[1] - LENGTHS[0])
    assert short > len(keep) * 2 * HEADS * 16 * 4 * LENGTHS[0]  # the states
