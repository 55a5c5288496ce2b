"""The Mamba-1 mixer: what it computes, decoding, and how it starts."""

import functools

import pytest
import torch
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
from transpoint.students import HybridForCausalLM, StudentConfig, StudentError, build_student
from transpoint.teachers.random import random_teacher

pytestmark = pytest.mark.stack
BARE = {"conv_kernel": 1, "conv_activation": None, "gate": False}
STUDENTS = {
    "biases": ("qwen2", {}),
    "kept attention, norms and rope": ("qwen3", {"keep_attention": [1], "rope": True, "norm": True}),
    "no gate, no activation": ("qwen3", {"qk_norm": False, **BARE}),
    "from x": ("qwen2", {"selection": "x", "keep_attention": [1]}),
}
students = pytest.mark.parametrize("case", STUDENTS)


def build(family, keep_attention=(), mixer="mamba1", **options):
    teacher, _ = random_teacher(f"random-{family}")
    return teacher, build_student(teacher, StudentConfig(mixer, list(keep_attention), **options))


@functools.cache
def of(case):
    """In float64, where a difference is a mistake and not rounding; what as transferred does nothing is stirred."""
    family, options = STUDENTS[case]
    return stirred(build(family, **options)[1]).double()


@pytest.mark.parametrize(
    "family, options", [("llama", BARE), ("qwen2", {"norm": True}), ("qwen3", {"rope": True}), ("qwen3", BARE)]
)
@torch.no_grad()
def test_it_starts_as_mamba_2_does(family, options):
    """Which is tested against attention: the same decay for all numbers of a state, whatever the input."""
    (_, student), (_, other) = (
        build(family, mixer=mixer, **{"norm": False, "gate_bias": True, **options}) for mixer in ("mamba1", "mamba2")
    )
    ids = tokens()
    assert_near(logits(student, ids), logits(other, ids), 1e-5)
    found = [one.double() for one in (student, other)]
    half_life, scale = torch.tensor([1.0, 5.0, 30.0, 200.0]), torch.tensor([[0.5], [1.0], [2.0], [40.0]])
    for one in found:
        for mixer in one.mixer_layers():
            mixer.set_decay(half_life, scale)
    assert_near(*(logits(one, ids) for one in found))


@torch.no_grad()
def test_each_channel_has_a_scale_of_its_own():
    """By its steps, which leave its half-life as it is."""
    _, student = build("llama", conv_activation=None)
    mixer = student.mixer_layers()[0]
    hidden = torch.randn(2, LENGTH, 64)
    read = []
    mixer.out.register_forward_pre_hook(lambda module, args: read.append(args[0].unflatten(-1, (4, 16))))
    scale = torch.rand(4, 16) + 0.5
    for chosen in (torch.ones(4, 16), scale):
        mixer.set_decay(torch.tensor([1.0, 5.0, 30.0, 200.0]), chosen)
        mixer(hidden)
    torch.testing.assert_close(read[1], read[0] * scale)


@pytest.mark.parametrize("selection", ["hidden", "x"])
def test_steps_and_decay_can_be_learned(selection):
    """No input moves a step at first, but each can learn to, by inputs of its own: where the gate is open."""
    _, student = build("llama", selection=selection, gate_bias=True)
    student(tokens(), labels=tokens(seed=1)).loss.backward()
    mixer = student.mixer_layers()[0]
    if selection == "hidden":
        rows = mixer.in_proj.weight[-mixer.rank :], mixer.in_proj.weight.grad[-mixer.rank :]
        assert not rows[0].any() and torch.linalg.matrix_rank(rows[1]) == mixer.rank
    else:
        assert not mixer.dt_proj.weight.any() and mixer.dt_proj.weight.grad.any(1).all()
    assert mixer.A_log.grad.any(-1).all() and mixer.dt_bias.grad.all()


def test_what_is_random_is_the_same_each_time_and_differs_by_layer():
    one, other = (build("llama", selection="x")[1].mixer_layers() for _ in range(2))
    assert torch.equal(one[0].x_proj.weight, other[0].x_proj.weight)
    assert not torch.equal(one[0].x_proj.weight, one[1].x_proj.weight)


def test_positions_are_refused_where_b_and_c_have_no_heads():
    with pytest.raises(StudentError, match="student.rope is true with student.selection=x, .*set student.rope=false"):
        build("llama", selection="x", rope=True)


@pytest.mark.slow
@students
@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=5, unique=True))
def test_decoding_in_pieces_equals_a_full_forward(case, cuts):
    assert_decodes_in_pieces_as_at_once(of(case), cuts)


@students
def test_a_left_padded_batch_equals_unpadded_rows(case):
    assert_decodes_left_padded_rows_as_each_alone(of(case))


@pytest.mark.parametrize("case", ["kept attention, norms and rope", "from x"])
def test_a_saved_student_generates_as_before(case, tmp_path):
    student, ids = of(case), tokens(2, 6)
    student.save_pretrained(tmp_path)
    read = HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_near(logits(read, ids), logits(student, ids))
    runs = [read.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("options", [{}, {"norm": True, "gate_bias": False}], ids=["steps", "norm, gate without bias"])
def test_calibration_finds_half_life_and_scale(options):
    """Among all half-lives it leaves less than with one alone."""
    teacher, student = build("llama", **options)
    ids = tokens(2, 64)
    batches = [{"input_ids": ids, "position_ids": torch.arange(64).expand(2, -1)}]
    found = calibrate(teacher, student, batches)
    fewer = calibrate(teacher, build("llama", **options)[1], batches, half_lives=(32.0,))
    for layer, mixer in enumerate(student.mixer_layers()):
        error = found[layer].error
        assert 0 < error < 1 and error < fewer[layer].error
        assert len(mixer.A_log.detach().unique()) > 1


def test_what_it_remembers_is_as_large_as_it_says():
    for options in ({}, {"selection": "x"}):
        _, student = build("llama", **options)
        cache = student.new_cache()
        student(tokens(1, 5), cache=cache)
        assert cache.layers[0].ssm_state.numel() * 4 == student.mixer_layers()[0].state_bytes()
