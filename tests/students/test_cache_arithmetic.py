"""What two caches are to each other: their difference, what lies between them, and one of both texts."""

import pytest
import torch

from transpoint.students import HybridCache

A, B = 7, 6  # tokens of two texts
ONE = {"sizes": {"num_hidden_layers": 1}, "keep_attention": ()}
# One layer without a convolution over tokens: what is merged is then all that a reader of both texts would have.
MERGED = {
    "mamba2": {"conv_kernel": 1},
    "mamba2, a larger head": {"conv_kernel": 1, "expand_kv": True, "gate": False},
    "mamba1": {"mixer": "mamba1", "conv_kernel": 1},
    "mamba1 from x": {"mixer": "mamba1", "conv_kernel": 1, "selection": "x"},
    "s4d, pairs": {"mixer": "s4d", "conv_kernel": 1, "state_size": 8},
    "s4d, real": {"mixer": "s4d", "conv_kernel": 1, "state_size": 4, "modes": "real"},
    "rotated keys": {"conv_kernel": 1, "rope": True},
    "transmamba": {"mixer": "transmamba", "trans_points": 1},
}
ATTENTION = {
    "attention": {},
    "attention in a window": {"attention_window": 9},
    "a teacher's window": {"family": "mistral"},
}
lengths = pytest.mark.parametrize("lengths", [(A, B), (1, 1), (9, 20)])


def tokens(length, seed, batch=2):
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(student, ids, cache=None, start=0, **more):
    """A cache after these tokens, at positions from `start` on, and the last logits."""
    cache = student.new_cache(mergeable=True) if cache is None else cache
    positions = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
    return cache, student(ids, cache=cache, position_ids=positions, **more).logits


def merged(student, a, b):
    return read(student, a)[0].merge(read(student, b, start=a.shape[1])[0])


def near(found, expected, limit=1e-5):
    return (found - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("case", MERGED.values(), ids=MERGED.keys())
@lengths
def test_a_merged_layer_is_one_that_has_read_both(make_student, case, lengths):
    student = make_student(**(ONE | case))
    a, b = (tokens(length, seed) for seed, length in enumerate(lengths))
    both, _ = read(student, torch.cat((a, b), 1))
    cache = merged(student, a, b)
    assert cache.get_seq_length() == sum(lengths)
    more, start = tokens(3, 2), sum(lengths)
    assert near(read(student, more, cache, start)[1], read(student, more, both, start)[1])
    assert near(cache.layers[0].ssm_state, both.layers[0].ssm_state)
    assert near(cache.layers[0].log_decay, both.layers[0].log_decay)


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION.keys())
@lengths
def test_merged_attention_has_the_keys_and_values_of_both_texts(make_student, case, lengths):
    student = make_student(**case, sizes={"num_hidden_layers": 2}, keep_attention=(0,))
    a, b = (tokens(length, seed) for seed, length in enumerate(lengths))
    both, cache = read(student, torch.cat((a, b), 1))[0], merged(student, a, b)
    more, start = tokens(3, 2), sum(lengths)
    assert cache.get_seq_length() == start
    for _ in range(2):  # and once what is read on has joined them
        for name in ("keys", "values"):
            expected = getattr(both.layers[0], name)
            dim = 1 if "attention_window" in case else 2
            found = getattr(cache.layers[0], name)
            # A window may still hold what no later token sees.
            assert near(found.narrow(dim, found.shape[dim] - expected.shape[dim], expected.shape[dim]), expected)
        read(student, more, cache, start), read(student, more, both, start)


def test_a_convolution_mixes_only_the_first_tokens_of_the_second_text_otherwise(make_student):
    student = make_student(**ONE, conv_kernel=4)
    a, b = tokens(A, 0), tokens(B, 1)
    cache, both = merged(student, a, b).layers[0], read(student, torch.cat((a, b), 1))[0].layers[0]
    assert torch.allclose(cache.conv_state, both.conv_state, atol=1e-6)
    error = (cache.ssm_state - both.ssm_state).norm() / both.ssm_state.norm()
    alone = (read(student, b)[0].layers[0].ssm_state - both.ssm_state).norm() / both.ssm_state.norm()
    assert 1e-4 < error < alone
    short = merged(student, a, tokens(2, 1)).layers[0]  # fewer tokens than the convolution has taps
    expected = read(student, torch.cat((a, tokens(2, 1)), 1))[0].layers[0]
    assert torch.allclose(short.conv_state, expected.conv_state, atol=1e-6)


def test_merging_leaves_both_as_they_were_and_can_go_on(make_student, tmp_path):
    student = make_student(**ONE, conv_kernel=1)
    parts = [tokens(5, seed) for seed in range(3)]
    caches = [read(student, part)[0] for part in parts]
    before = [cache.layers[0].ssm_state.clone() for cache in caches]
    caches[2].save(tmp_path / "third.safetensors")
    third = HybridCache.load(tmp_path / "third.safetensors", student.config)
    found = caches[0].merge(caches[1]).fork(2).merge(third.fork(2))
    both = read(student, torch.cat(parts, 1))[0].fork(2)
    assert near(found.layers[0].ssm_state, both.layers[0].ssm_state)
    assert all(torch.equal(cache.layers[0].ssm_state, old) for cache, old in zip(caches, before, strict=True))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"mixer": "gdn"}, r"layer 0 \(gdn\) cannot be merged: what its tokens leave .* is no factor"),
        ({"mixer": "window_mamba2"}, r"layer 0 \(window_mamba2\) cannot be merged: its window and sinks are those of"),
        ({"mixer": "transmamba", "trans_points": 10}, "both have to be past its TransPoint"),
    ],
)
def test_what_has_no_closed_form_is_not_merged(make_student, options, reason):
    with pytest.raises(ValueError, match=reason):
        merged(make_student(**(ONE | options)), tokens(A, 0), tokens(B, 1))


def test_what_cannot_be_merged_as_it_was_read_is_refused(make_student):
    student = make_student(**ONE)
    one, _ = read(student, tokens(A, 0))
    with pytest.raises(ValueError, match=r"the decays were not kept: read both with new_cache\(mergeable=True\)"):
        one.merge(read(student, tokens(B, 1), student.new_cache())[0])
    with pytest.raises(ValueError, match="has padding, which cannot come after tokens"):
        one.merge(read(student, tokens(B, 1), attention_mask=torch.tensor([[0] + [1] * 5, [1] * 6]))[0])
    with pytest.raises(ValueError, match="more rows than the other"):
        one.merge(read(student, tokens(B, 1, batch=3))[0])
    with pytest.raises(ValueError, match="of a model with other layers"):
        one.merge(read(make_student(**ONE, gate=False), tokens(B, 1))[0])
    with pytest.raises(ValueError, match="static"):
        one.merge(student.new_cache(16))
    with pytest.raises(ValueError, match="static"):
        student.new_cache(16, mergeable=True)


CASES = {
    "hybrid": {},
    "a teacher's window": {"family": "mistral"},
    "gdn": {"mixer": "gdn"},
    "s4d": {"mixer": "s4d"},
    "window and state": {"mixer": "window_mamba2", "window": 4},
    "window and delta rule": {"mixer": "window_gdn", "window": 4},
    "transmamba": {"mixer": "transmamba", "trans_points": [0, 3, "inf", 20]},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_interpolated_by_0_and_1_it_is_one_of_both(make_student, case):
    student = make_student(**case)
    (one, _), (two, _) = (read(student, tokens(A, seed)) for seed in (0, 1))
    more = tokens(1, 2)
    at = {weight: read(student, more, one.interpolate(two, weight), A)[1] for weight in (0, 0.5, 1)}
    assert torch.equal(at[0], read(student, more, one.fork(), A)[1])
    assert torch.equal(at[1], read(student, more, two.fork(), A)[1])
    assert not near(at[0.5], at[0]) and not near(at[0.5], at[1])


def test_states_of_texts_of_two_lengths_are_interpolated_but_keys_are_not(make_student):
    mixers, hybrid = make_student(keep_attention=()), make_student()
    between = read(mixers, tokens(4, 0))[0].interpolate(read(mixers, tokens(8, 1))[0], 0.5)
    assert between.get_seq_length() == 6
    with pytest.raises(ValueError, match="^layer 1 does not hold as much in both caches"):
        read(hybrid, tokens(4, 0))[0].interpolate(read(hybrid, tokens(8, 1))[0], 0.5)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1", "gdn", "s4d", "softmax"])
def test_differences_are_norms_by_head(make_student, mixer):
    options = {"attention_window": 30} if mixer == "softmax" else {"mixer": mixer}
    student = make_student(**options)
    (one, _), (two, _) = (read(student, tokens(A, seed)) for seed in (0, 1))
    found = one.difference(two)
    states = [layer.ssm_state for layer in (one.layers[0], two.layers[0])]
    if states[0] is not None:
        a, b = (state.reshape(2, 4, -1) for state in states)
        assert torch.allclose(found[0].distance, (a - b).norm(dim=-1)) and torch.allclose(found[0].norm, a.norm(dim=-1))
    assert [part.norm.shape for part in found] == [(2, 4), (2, 2), (2, 4), (2, 4)]
    assert all((0 < part.relative).all() and (part.relative <= 2).all() for part in found)
    assert all((part.relative == 0).all() for part in one.difference(one.fork()))
    longer, _ = read(student, tokens(A + 1, 1))
    assert one.difference(longer)[1] is None and student.new_cache().difference(one) == [None] * 4
