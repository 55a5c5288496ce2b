"""Sequences in which passages come again."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from run_files import done
from transpoint.distill.data.repeated import PASSAGE, PASSAGES, Repeated, with_passages_again
from transpoint.distill.run.files import read_json


class Counting:
    """Every token is another number."""

    tokens_per_item = 256

    def __init__(self, lengths=(256,)):
        self.positions = torch.cat([torch.arange(length) for length in lengths])

    def batch(self, step, batch_size, seed, slots):
        first = 1000 * step
        items = (torch.arange(256) + 100_000 * slot + first for slot in slots)
        return [{"input_ids": ids, "position_ids": self.positions} for ids in items]

    def state_dict(self, slots):
        return {"slots": list(slots)}


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=5), seed=st.integers(0, 2**32))
def test_passages_of_the_first_half_of_the_longest_document_stand_in_its_second(lengths, seed):
    ids = torch.arange(sum(lengths)) + 5
    positions = torch.cat([torch.arange(length) for length in lengths])
    found = with_passages_again(ids, positions, np.random.default_rng(seed))
    longest = int(np.argmax(lengths))
    first, length = sum(lengths[:longest]), lengths[longest]
    changed = (found != ids).nonzero().flatten()
    if length < 4 * PASSAGE[0]:
        assert not len(changed)
        return
    assert len(changed) and first + length // 2 <= changed[0] and changed[-1] < first + length
    again = found[changed[0] : changed[-1] + 1] - 5  # each token says where it comes from
    assert len(again) == len(changed) and again.min() >= first and again.max() < first + length // 2
    assert len(again.unique()) == len(again)
    passages = 1 + int((again[1:] != again[:-1] + 1).sum())
    assert passages <= PASSAGES and PASSAGE[0] <= len(again) and len(again) <= PASSAGES * PASSAGE[1]


def test_which_sequences_follows_from_seed_step_and_slot():
    data = Repeated(Counting(), 0.25)
    items = [item["input_ids"] for step in range(100) for item in data.batch(step, 4, 0, range(4))]
    plain = [item["input_ids"] for step in range(100) for item in Counting().batch(step, 4, 0, range(4))]
    changed = [not torch.equal(a, b) for a, b in zip(items, plain, strict=True)]
    assert 70 < sum(changed) < 130
    again = [item["input_ids"] for step in range(100) for slot in range(4) for item in data.batch(step, 4, 0, [slot])]
    assert all(map(torch.equal, items, again))
    other = [item["input_ids"] for step in range(100) for item in data.batch(step, 4, 1, range(4))]
    assert not all(map(torch.equal, items, other))
    assert copy.copy(data).share == 0.25
    assert data.state_dict(range(2)) == {"slots": [0, 1]} and not hasattr(data, "load_state_dict")


@pytest.mark.slow
def test_a_run_trains_on_them(tiny_copy, run_tiny):
    for stage in ("align", "distill"):  # where nothing is repeated, runs of versions without the setting still hold
        assert "repeats" not in read_json(tiny_copy / stage / "stage.json")[stage]
    before = [done(tiny_copy, stage)["training"]["loss"] for stage in ("align", "distill")]
    run_tiny(tiny_copy, "align.repeats=1", "distill.repeats=1")
    after = [done(tiny_copy, stage)["training"]["loss"] for stage in ("align", "distill")]
    assert all(a != b for a, b in zip(before, after, strict=True))
