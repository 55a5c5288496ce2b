"""Documents packed in one sequence, told by position ids that restart, do not see each other."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

STUDENTS = {
    "hybrid": {"family": "llama", "keep_attention": (1,)},
    "hybrid with rope": {"family": "qwen3", "keep_attention": (1,), "rope": True},
    "window": {"family": "mistral", "keep_attention": (0,)},
    "gated delta rule": {"family": "qwen3", "keep_attention": (1,), "mixer": "gdn"},
    "s4d": {"family": "qwen3", "keep_attention": (1,), "mixer": "s4d", "state_size": 8},
    "Mamba-1": {"family": "qwen2", "keep_attention": (1,), "mixer": "mamba1"},
    "softmax attention": {"family": "mistral", "keep_attention": (1,), "mixer": "softmax", "attention_window": 7},
    "all mixers": {"family": "qwen2", "keep_attention": ()},
}


@pytest.fixture(scope="module")
def make_student(make_student):
    """In float64, where a difference is a mistake and not rounding."""
    return lambda *args, **kwargs: make_student(*args, **kwargs).double()


@pytest.fixture(scope="module", params=STUDENTS.values(), ids=STUDENTS.keys())
def student(make_student, request):
    return make_student(**request.param)


@torch.no_grad()
def logits(student, ids, positions=None):
    return student(ids, position_ids=positions, use_cache=False).logits


def assert_near(found, expected):
    assert (found - expected).norm() / expected.norm() < 1e-9


def tokens(batch, length):
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(length))


def positions_of(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5))
def test_packed_documents_equal_separate_ones(student, lengths):
    ids = tokens(1, sum(lengths))
    packed = logits(student, ids, positions_of(lengths)).split(lengths, 1)
    for found, document in zip(packed, ids.split(lengths, 1), strict=True):
        assert_near(found, logits(student, document))


@settings(max_examples=8)
@given(cuts=st.lists(st.integers(1, 39), min_size=2, max_size=2))
def test_rows_of_a_batch_have_boundaries_of_their_own(student, cuts):
    ids = tokens(2, 40)
    packed = logits(student, ids, torch.cat([positions_of([cut, 40 - cut]) for cut in cuts]))
    for row, cut in enumerate(cuts):
        assert_near(packed[row, :cut], logits(student, ids[row : row + 1, :cut])[0])
        assert_near(packed[row, cut:], logits(student, ids[row : row + 1, cut:])[0])


def test_one_row_of_positions_holds_for_the_whole_batch(student):
    ids, positions = tokens(3, 20), positions_of([8, 12])
    assert torch.equal(logits(student, ids, positions), logits(student, ids, positions.expand(3, -1)))


def test_without_restarts_the_documents_would_see_each_other(student):
    ids = tokens(1, 20)
    apart = logits(student, ids, positions_of([8, 12]))[:, 8:]
    together = logits(student, ids, positions_of([20]))[:, 8:]
    assert torch.equal(logits(student, ids)[:, 8:], together)
    assert (apart - together).norm() / apart.norm() > 1e-2
