"""A window of attention against attention with a mask written out."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from families import tiny_teacher
from transpoint.distill.objectives import attention_pairs
from transpoint.distill.selection.stand_ins import mixers, windows
from transpoint.students import StudentConfig, build_student
from transpoint.teachers import attention_view
from transpoint.teachers.random import random_teacher


@pytest.fixture(scope="module")
def teacher():
    return random_teacher("random-llama")[0].requires_grad_(False)


def inputs_of(teacher, length, rows=2):
    ids = torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(length))
    batch = {"input_ids": ids, "position_ids": torch.arange(length).expand(rows, -1)}
    return attention_pairs(teacher, attention_view(teacher, check=False), batch)


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 40), window=st.integers(1, 50), sinks=st.integers(0, 6))
def test_a_window_is_attention_with_a_mask(teacher, length, window, sinks):
    hidden, _, rotary = inputs_of(teacher, length)[1]
    view = attention_view(teacher, check=False)[1]
    q, k, v = view.project(hidden, rotary)
    t, s = torch.arange(length)[:, None], torch.arange(length)
    seen = (s <= t) & ((t - s < window) | (s < sinks))
    weights = view.weights(q, k).masked_fill(~seen, 0)
    wanted = view.o_proj(view.attend(weights / weights.sum(-1, keepdim=True), v).flatten(2))
    torch.testing.assert_close(windows(teacher, window, sinks)[1](hidden, rotary), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "mistral", "olmo2", "phi3"])
def test_a_window_as_long_as_the_text_is_the_layer_s_own_attention(family):
    teacher = tiny_teacher(family).requires_grad_(False)
    for layer, (hidden, wanted, rotary) in inputs_of(teacher, 24).items():
        torch.testing.assert_close(windows(teacher, 24)[layer](hidden, rotary), wanted, atol=1e-5, rtol=1e-5)


def test_a_layer_s_own_window_stays():
    teacher = tiny_teacher("mistral").requires_grad_(False)
    teacher.config.sliding_window = 5
    hidden, wanted, rotary = inputs_of(teacher, 24)[0]
    torch.testing.assert_close(windows(teacher, 16)[0](hidden, rotary), wanted, atol=1e-5, rtol=1e-5)


def test_a_mixer_is_the_student_s(teacher):
    student = build_student(teacher, StudentConfig(keep_attention=[2]))
    hidden, _, rotary = inputs_of(teacher, 24)[1]
    found = mixers(student)
    assert list(found) == [0, 1, 3]
    assert torch.equal(found[1](hidden, rotary), student.mixer_layers()[1](hidden, rotary)[0])
