"""The S4D mixer: how it starts, decoding, and calibration."""

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
from transpoint.teachers import attention_view
from transpoint.teachers.random import random_teacher

pytestmark = pytest.mark.stack
BARE = {"conv_kernel": 1, "conv_activation": None, "gate": False, "norm": False}
MODES = {"lin": {"state_size": 8}, "real": {"modes": "real", "state_size": 5}}
STUDENTS = {
    "llama": ("llama", {}),
    "real modes, biases": ("qwen2", MODES["real"]),
    "kept attention": ("qwen3", {"keep_attention": [1], "state_size": 8}),
    "no gate, no norm, no activation": ("llama", {"state_size": 2, **BARE}),
}
students = pytest.mark.parametrize("case", STUDENTS)
modes = pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())


def build(family, keep_attention=(), **options):
    teacher, _ = random_teacher(f"random-{family}")
    return teacher, build_student(teacher, StudentConfig("s4d", list(keep_attention), **options))


@functools.cache
def of(case):
    """In float64, where a difference is a mistake and not rounding; what as transferred does nothing is stirred."""
    family, options = STUDENTS[case]
    return stirred(build(family, **options)[1]).double()


@modes
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_it_starts_as_a_mean_of_the_teachers_values(family, options):
    """Each head's of the key/value head that it reads in the teacher, by weights that fall to half in 32 tokens."""
    teacher, student = build(family, **BARE, **options)
    view, mixer = attention_view(teacher)[0], student.mixer_layers()[0]
    hidden = torch.randn(2, 100, 64)
    decay, t = 0.5 ** (1 / 32), torch.arange(100.0)
    weights = ((1 - decay) * decay ** (t[:, None] - t)).tril()
    with torch.no_grad():
        v = view.v_proj(hidden).unflatten(-1, (view.num_kv_heads, -1))
        v = v.repeat_interleave(view.num_heads // view.num_kv_heads, 2).flatten(2)
        torch.testing.assert_close(mixer(hidden)[0], view.o_proj(weights @ v), rtol=1e-4, atol=1e-5)


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
    student, ids = of("kept attention"), tokens(2, 6)
    student.save_pretrained(tmp_path)
    read = HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_near(logits(read, ids), logits(student, ids))
    runs = [read.generate(ids, max_new_tokens=14, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*runs)


@modes
@pytest.mark.parametrize("norm", [True, False])
def test_calibration_finds_half_life_and_scale(norm, options):
    """Among all half-lives it leaves less than with one alone, and none of it by what the student was before."""
    ids = tokens(2, 64)
    batches = [{"input_ids": ids, "position_ids": torch.arange(64).expand(2, -1)}]
    teacher, student = build("llama", norm=norm, **options)
    found = calibrate(teacher, student, batches)
    fewer = calibrate(teacher, build("llama", norm=norm, **options)[1], batches, half_lives=(0.5,))
    assert all(0 < found[layer].error < fewer[layer].error < 1 for layer in found)
    again = calibrate(teacher, student, batches)
    assert all(again[layer].record() == found[layer].record() for layer in found)


def test_a_head_has_the_half_life_and_the_scale_that_are_set():
    """What one token leaves in the outputs of a head falls to half in so many tokens."""
    mixer = build("llama", **BARE)[1].mixer_layers()[0]
    half_life, scale = torch.tensor([2.0, 4.0, 8.0, 16.0]), torch.arange(1.0, 65.0).view(4, 16)
    mixer.set_decay(half_life, scale)
    read = []
    mixer.out.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    hidden = torch.zeros(1, 400, 64)
    hidden[0, 0] = torch.randn(64)
    with torch.no_grad():
        mixer(hidden)
        values = mixer.in_proj(hidden[0, 0]).view(2, 1, 16).expand(2, 2, 16).flatten(0, 1)
    heads = read[0][0].unflatten(-1, (4, 16))
    for head, tokens_ in enumerate((2, 4, 8, 16)):
        torch.testing.assert_close(heads[tokens_, head], heads[0, head] / 2)
    torch.testing.assert_close(heads.sum(0), scale * values, rtol=1e-4, atol=1e-4)


def test_its_cost_is_that_of_its_state():
    mixer = build("llama", state_size=8)[1].mixer_layers()[0]
    assert mixer.state_bytes() == 4 * 64 * 8
    assert mixer.flops(100) == 64 * 4 * 8 + 2 * 32 * 4  # to write to the state and to read it, and the convolution
    student = build("llama", state_size=8)[1]
    cache = student(tokens(1, 9), use_cache=True).past_key_values
    assert all(layer.ssm_state[0].numel() * 4 == mixer.state_bytes() for layer in cache.layers)


def test_pairs_of_an_odd_number_are_refused():
    told = "student.state_size is 5, and modes of lin are pairs: set an even one"
    with pytest.raises(StudentError, match=told):
        StudentConfig("s4d", state_size=5).check()
    StudentConfig("s4d", state_size=5, modes="real").check()
