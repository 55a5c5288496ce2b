"""The gated DeltaNet mixer: what it computes, decoding, and how it starts."""

import functools

import pytest
import torch
import torch.nn.functional as F
from decoding import (
    LENGTH,
    assert_decodes_in_pieces_as_at_once,
    assert_decodes_left_padded_rows_as_each_alone,
    assert_near,
    logits,
    stirred,
    tokens,
)
from hypothesis import given, settings, strategies as st

from transpoint.distill.train.calibration import calibrate
from transpoint.kernels.delta_reference import delta_scan
from transpoint.students import HybridForCausalLM, StudentConfig, build_student
from transpoint.teachers import attention_view
from transpoint.teachers.random import random_teacher

pytestmark = pytest.mark.stack
BARE = {"conv_kernel": 1, "conv_activation": None, "gate": False, "gate_bias": True}
STUDENTS = {
    "llama": ("llama", {}),
    "biases": ("qwen2", {"gate_bias": True}),
    "kept attention, norms and rope": ("qwen3", {"keep_attention": [1], "rope": True}),
    "no gate, no activation": ("qwen3", {"qk_norm": False, **BARE}),
}
students = pytest.mark.parametrize("case", STUDENTS)


def build(family, keep_attention=(), **options):
    teacher, _ = random_teacher(f"random-{family}")
    return teacher, build_student(teacher, StudentConfig("gdn", list(keep_attention), **options))


@functools.cache
def of(case):
    """In float64, where a difference is a mistake and not rounding; what as transferred does nothing is stirred."""
    family, options = STUDENTS[case]
    return stirred(build(family, **options)[1]).double()


@pytest.mark.parametrize("family, rope", [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", True)])
def test_it_starts_as_the_delta_rule_on_the_teachers_queries_keys_and_values(family, rope):
    """Each head with the key/value head that it reads in the teacher, normed and rotated as there.

    What is read by queries of length 1/sqrt(P), as released layers have it, is normed with the teacher's epsilon.
    """
    teacher, student = build(family, rope=rope, **BARE)
    view, mixer = attention_view(teacher)[0], student.mixer_layers()[0]
    hidden = torch.randn(2, LENGTH, 64)
    rotary = teacher.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    none = tuple(torch.full_like(rotary[0], value) for value in (1.0, 0.0))
    with torch.no_grad():
        q, k, v = view.project(hidden, rotary if rope else none)
        g, beta = torch.full((2, LENGTH, 4), 0.5).log() / 32, torch.full((2, LENGTH, 4), 0.1)
        y = delta_scan(F.normalize(q, dim=-1) * view.head_dim**-0.5, F.normalize(k, dim=-1), v, g, beta)
        expected = view.o_proj(F.rms_norm(y, y.shape[-1:], eps=1e-6).flatten(2))
        torch.testing.assert_close(mixer(hidden, rotary)[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@students
@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=5, unique=True))
def test_decoding_in_pieces_equals_a_full_forward(case, cuts):
    assert_decodes_in_pieces_as_at_once(of(case), cuts)


@students
def test_a_left_padded_batch_equals_unpadded_rows(case):
    assert_decodes_left_padded_rows_as_each_alone(of(case))


def test_a_saved_student_generates_as_before(tmp_path):
    student, ids = of("kept attention, norms and rope"), tokens(2, 6)
    student.save_pretrained(tmp_path)
    read = HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_near(logits(read, ids), logits(student, ids))
    runs = [read.generate(ids, max_new_tokens=14, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("decay", ["fit", "lookback"])
@pytest.mark.parametrize("gate_bias", [False, True])
def test_calibration_finds_half_life_strength_and_scale(decay, gate_bias):
    """Among all half-lives it leaves less than with one alone; each head's strength is one of those it may choose."""
    teacher, student = build("llama", gate_bias=gate_bias)
    ids = tokens(2, 64)
    batches = [{"input_ids": ids, "position_ids": torch.arange(64).expand(2, -1)}]
    found = calibrate(teacher, student, batches, decay)
    fewer = calibrate(teacher, build("llama", gate_bias=gate_bias)[1], batches, half_lives=(32.0,))
    for layer, mixer in enumerate(student.mixer_layers()):
        figures = found[layer]
        assert 0 < figures.error < 1
        if decay == "fit":
            assert figures.error < fewer[layer].error
        hidden = teacher.model.embed_tokens(ids)
        with torch.no_grad():
            b = mixer.in_proj(hidden)[..., -mixer.num_heads :]
        if gate_bias:
            strengths = torch.tensor(mixer.strengths)
            assert all((strengths - own).abs().min() < 1e-6 for own in mixer.b_bias.sigmoid()) and not b.any()
        else:
            assert b.any()
