"""Softmax attention as a mixer: the teacher's, by a window written down, without positions; and decoding."""

import dataclasses
import functools

import pytest
import torch
from decoding import (
    LENGTH,
    assert_decodes_in_pieces_as_at_once,
    assert_decodes_left_padded_rows_as_each_alone,
    assert_near,
    in_pieces,
    logits,
    tokens,
)
from hypothesis import given, settings, strategies as st

from transpoint.students import HybridCache, HybridForCausalLM, StudentConfig, StudentError, build_student
from transpoint.teachers.random import random_teacher

pytestmark = pytest.mark.stack
STUDENTS = {
    "window": ("llama", {"attention_window": 5}),
    "the teacher's window, no positions": ("mistral", {"attention_positions": False}),
    "norms, biases": ("qwen3", {"attention_window": 1, "attention_positions": False}),
    "what kept attention becomes": ("qwen2", {"mixer": "mamba2", "keep": "every:2", "attention_window": 5}),
    "beside TransPoints": ("llama", {"mixer": "transmamba", "keep": [1], "trans_points": 7, "attention_window": 3}),
}
OPTIONS = {"attention_window": None, "attention_positions": True, "attention_shared_rank": None}
students = pytest.mark.parametrize("case", STUDENTS)


def build(family, mixer="softmax", keep=(), seed=0, **options):
    """In float64, where a difference is a mistake and not rounding."""
    teacher, _ = random_teacher(f"random-{family}", seed)
    keep = keep if isinstance(keep, str) else list(keep)
    return build_student(teacher, StudentConfig(mixer, keep, **options)).double()


@functools.cache
def of(case):
    family, options = STUDENTS[case]
    return build(family, **options)


# What it computes


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("window", [None, 64])
def test_with_a_window_over_all_it_is_the_teacher(family, window):
    teacher, _ = random_teacher(f"random-{family}", 0)
    student = build_student(teacher, StudentConfig("softmax", [], attention_window=window))
    ids, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :9] = 0
    positions = torch.cat((torch.arange(9), torch.arange(LENGTH - 9)))[None]
    for kwargs, real in (
        ({}, mask >= 0),
        ({"attention_mask": mask}, mask == 1),
        ({"position_ids": positions}, mask >= 0),
    ):
        found, expected = (logits(model, ids, **kwargs)[real] for model in (student, teacher))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(window=st.integers(1, LENGTH + 2), positions=st.booleans())
@torch.no_grad()
def test_window_and_positions_written_down(window, positions):
    student = build("qwen2", attention_window=window, attention_positions=positions)
    mixer = student.mixer_layers()[1]
    hidden = torch.randn(1, LENGTH, student.config.hidden_size, dtype=torch.float64)
    cos, sin = rotary = student.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    H, K, P = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim

    def turned(t):
        a, b = t.chunk(2, -1)
        return t * cos[0] + torch.cat((-b, a), -1) * sin[0] if positions else t

    t = torch.arange(LENGTH)
    mask = (t[None] <= t[:, None]) & (t[None] > t[:, None] - window)
    rows = []
    for head in range(H):
        q = turned(mixer.q_proj(hidden)[0, :, head * P : (head + 1) * P])
        shared = slice(head // (H // K) * P, (head // (H // K) + 1) * P)
        k, v = turned(mixer.k_proj(hidden)[0, :, shared]), mixer.v_proj(hidden)[0, :, shared]
        rows.append((q @ k.T / P**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v)
    assert_near(mixer(hidden, rotary)[0][0], mixer.o_proj(torch.cat(rows, -1)))


@students
def test_packed_documents_are_computed_as_each_alone(case):
    student, ids = of(case), tokens(1, 30)
    positions = torch.cat([torch.arange(n) for n in (11, 3, 16)])[None]
    found = logits(student, ids, position_ids=positions)
    alone = [logits(student, part) for part in ids.split([11, 3, 16], 1)]
    assert_near(found, torch.cat(alone, 1))


def test_without_positions_the_order_of_what_was_before_counts_for_nothing():
    student = build("llama", attention_positions=False)
    mixer, hidden = student.mixer_layers()[0], torch.randn(1, 9, student.config.hidden_size, dtype=torch.float64)
    rotary = student.model.rotary_emb(hidden, torch.arange(9)[None])
    mixed = hidden[:, [*torch.randperm(8).tolist(), 8]]
    with torch.no_grad():
        assert_near(mixer(mixed, rotary)[0][:, -1], mixer(hidden, rotary)[0][:, -1])


# Decoding


@pytest.mark.slow
@students
@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=5, unique=True))
def test_decoding_in_pieces_equals_a_full_forward(case, cuts):
    assert_decodes_in_pieces_as_at_once(of(case), cuts)


@students
def test_a_left_padded_batch_token_by_token_equals_unpadded_rows(case):
    assert_decodes_left_padded_rows_as_each_alone(of(case))


def test_a_cache_holds_the_window_and_no_more_and_goes_through_a_file(tmp_path):
    student, ids = build("llama", attention_window=5), tokens(2, 30)
    cache = student.new_cache()
    in_pieces(student, ids[:, :20], [12, 1, 7], cache=cache)
    assert all(layer.keys.shape[1] == layer.values.shape[1] == 4 for layer in cache.layers)
    cache.save(tmp_path / "cache.safetensors")
    read = HybridCache.load(tmp_path / "cache.safetensors", student.config, dtype=torch.float64)
    expected = logits(student, ids)[:, 20:]
    with torch.no_grad():
        assert_near(student(ids[:, 20:], cache=read).logits, expected)
    other = build("llama", attention_window=6).config
    with pytest.raises(ValueError, match="mixer_options"):
        HybridCache.load(tmp_path / "cache.safetensors", other, dtype=torch.float64)


@pytest.mark.parametrize("case", ["what kept attention becomes", "beside TransPoints"])
def test_generation_with_a_cache_equals_generation_without(case):
    student, ids = of(case), tokens(2, 6)
    found = [student.generate(ids, max_new_tokens=14, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*found)
    beams = student.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False)
    assert beams.shape[0] == 2


# In a student


def test_what_is_set_of_kept_attention_makes_it_a_mixer_of_its_own_options(tmp_path):
    teacher, _ = random_teacher("random-llama", 0)
    config = StudentConfig(keep_attention="every:2", attention_window=5)
    student = build_student(teacher, config)
    assert student.config.mixers == ["mamba2", "softmax"] * 2
    assert student.config.options_of("softmax") == OPTIONS | {"attention_window": 5}
    assert "attention_window" not in student.config.options_of("mamba2")
    student.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(student, tokens()))
    assert config.facts() == StudentConfig(keep_attention="every:2").facts() | student.config.options_of("softmax")
    start = build_student(teacher, dataclasses.replace(config, attention_window=6))
    with pytest.raises(StudentError, match="student.attention_window is 5, and 6 in the student to start from"):
        build_student(teacher, config, start)


def test_its_trans_point_is_infinity():
    student = of("beside TransPoints")
    assert student.config.trans_points == [7, "inf", 7, 7] and student.trans_points == [7, float("inf"), 7, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_window": 0}, "student.attention_window is 0; expected at least 1"),
        ({"attention_window": 2.5}, "student.attention_window is 2.5; expected a whole number"),
        ({"attention_positions": "no"}, "student.attention_positions is 'no'; expected true or false"),
        (
            {"attention_window": 5, "keep_attention": []},
            "student.attention_window is 5, and no layer keeps attention: name some in student.keep_attention",
        ),
        (
            {"attention_positions": False, "mixer": "transmamba"},
            "student.attention_positions is False, and no layer keeps attention: name some in student.keep_attention",
        ),
    ],
)
def test_what_no_student_can_have_is_refused_in_one_line(options, message):
    with pytest.raises(StudentError) as caught:
        StudentConfig(**options).check()
    assert str(caught.value) == message
    dataclasses.replace(
        StudentConfig(**options), attention_window=3, attention_positions=None, keep_attention=[1]
    ).check()


def test_bytes_and_operations_are_those_of_the_window():
    (wide, *_), (narrow, *_) = (build("llama", attention_window=size).mixer_layers() for size in (None, 8))
    keys_and_values = 2 * 2 * wide.num_kv_heads * wide.head_dim
    assert (wide.state_bytes(), wide.token_bytes()) == (0, keys_and_values)
    assert (narrow.state_bytes(), narrow.token_bytes()) == (8 * keys_and_values, 0)
    width = 4.0 * wide.num_heads * wide.head_dim
    assert wide.flops(64) == width * sum(range(1, 65)) / 64
    assert narrow.flops(64) == width * (sum(range(1, 9)) + 56 * 8) / 64
