"""The cache of a student: what it holds, how it is reordered and reset, and which caches are refused."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from transpoint.students import HybridCache

MIXERS = (0, 2, 3)  # of a student that keeps attention in layer 1


def tokens(batch=2, length=9, seed=0):
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(student, ids, cache):
    return student(ids, past_key_values=cache).logits


def filled(student, ids):
    cache = student.new_cache()
    feed(student, ids, cache)
    return cache


def assert_near(found, expected):
    assert (found - expected).norm() / expected.norm() < 1e-4


def bytes_held(layer):
    tensors = (layer.keys, layer.values) if layer.keys is not None else (layer.conv_state, layer.ssm_state)
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_mixer_layers_hold_the_same_bytes_however_long_they_decode(make_student):
    student, ids = make_student(), tokens(length=40)
    cache = filled(student, ids[:, :5])
    sizes = []
    for t in range(5, 40):
        feed(student, ids[:, t : t + 1], cache)
        sizes.append([bytes_held(layer) for layer in cache.layers])
    heads, kv_heads, size, batch = 4, 2, 16, 2
    expected = 4 * batch * (heads * size * size + (2 * kv_heads + heads) * size * 3)  # float32 state and tail
    assert all(held[layer] == expected for held in sizes for layer in MIXERS)
    assert sizes[-1][1] > sizes[0][1]
    assert [layer.get_seq_length() for layer in cache.layers] == [40] * 4


@pytest.mark.parametrize("kernel", [1, 4])
def test_a_state_is_float32_and_a_tail_has_one_input_less_than_the_convolution_has_taps(make_student, kernel):
    student = make_student(conv_kernel=kernel).to(torch.bfloat16)
    layer = filled(student, tokens()).layers[0]
    assert layer.ssm_state.dtype == torch.float32 and layer.ssm_state.shape == (2, 4, 16, 16)
    assert layer.conv_state.dtype == torch.bfloat16 and layer.conv_state.shape == (2, 128, kernel - 1)


def test_a_forward_pass_in_eval_mode_returns_a_hybrid_cache_and_in_training_none(make_student):
    student = make_student()
    with torch.no_grad():
        cache = student(tokens()).past_key_values
        assert isinstance(cache, HybridCache) and cache.get_seq_length() == 9
        assert student.train()(tokens()).past_key_values is None


@pytest.mark.parametrize("keep", [(1,), ()], ids=["hybrid", "all mixers"])
def test_a_reset_cache_is_as_a_new_one(make_student, keep):
    student, ids = make_student(keep_attention=keep), tokens()
    cache = filled(student, tokens(seed=1))
    assert cache.get_seq_length() == 9
    cache.reset()
    assert all(layer.get_seq_length() == 0 for layer in cache.layers)
    assert torch.equal(feed(student, ids, cache), feed(student, ids, student.new_cache()))


REARRANGED = {
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
}


@pytest.mark.parametrize("change, rows", REARRANGED.values(), ids=REARRANGED.keys())
@pytest.mark.parametrize("keep", [(1,), ()], ids=["hybrid", "all mixers"])
def test_rows_of_a_cache_can_be_rearranged(make_student, keep, change, rows):
    student, ids, more = make_student(keep_attention=keep), tokens(3), tokens(6, 2, seed=1)
    cache = filled(student, ids)
    change(cache)
    found = feed(student, more[: len(rows)], cache)
    expected = feed(student, torch.cat((ids[rows], more[: len(rows)]), 1), student.new_cache())[:, -2:]
    assert_near(found, expected)


def test_rearranging_and_resetting_an_empty_cache_does_nothing(make_student):
    student, ids = make_student(keep_attention=()), tokens()
    cache = student.new_cache()
    for change, _ in REARRANGED.values():
        change(cache)
    cache.reset()
    assert torch.equal(feed(student, ids, cache), feed(student, ids, student.new_cache()))


def test_copies_of_a_row_do_not_share_their_states(make_student):
    student, ids = make_student(keep_attention=()), tokens(1)
    cache = filled(student, ids)
    cache.batch_repeat_interleave(2)
    feed(student, torch.tensor([[5], [6]]), cache)
    for row, token in enumerate((5, 6)):
        alone = filled(student, torch.cat((ids, torch.tensor([[token]])), 1))
        for layer, expected in zip(cache.layers, alone.layers, strict=True):
            assert_near(layer.ssm_state[row], expected.ssm_state[0])
            assert_near(layer.conv_state[row], expected.conv_state[0])


def test_a_cache_is_not_cropped(make_student):
    student = make_student(keep_attention=())
    with pytest.raises(RuntimeError, match="a recurrent state cannot be rolled back: crop and assisted decoding"):
        filled(student, tokens()).crop(1)


def test_assisted_decoding_is_refused(make_student):
    student = make_student()
    with pytest.raises(ValueError, match="stateful"):
        student.generate(tokens(1), assistant_model=make_student(seed=1), max_new_tokens=4)


def test_a_static_cache_is_refused_in_generation_naming_what_to_leave_out(make_student):
    with pytest.raises(ValueError) as caught:
        make_student().generate(tokens(), max_new_tokens=4, cache_implementation="static")
    assert str(caught.value) == (
        "cache_implementation='static' is not possible for a hybrid: its mixer layers keep a state, not keys and "
        "values; leave it out"
    )


CACHES = {
    "an empty one": (lambda config: DynamicCache(), "DynamicCache|DynamicLayer"),
    "one made for the config": (lambda config: DynamicCache(config=config), "DynamicLayer"),
    "a static one": (lambda config: StaticCache(config=config, max_cache_len=32), "StaticLayer"),
}


@pytest.mark.parametrize("make_cache, held", CACHES.values(), ids=CACHES.keys())
@pytest.mark.parametrize("keep, layer", [((1,), 0), ((0,), 1), ((), 0)])
def test_a_cache_without_states_is_refused_naming_what_to_pass(make_student, make_cache, held, keep, layer):
    student = make_student(keep_attention=keep)
    with pytest.raises(TypeError, match=rf"^layer {layer} is a mixer, but the cache holds a ({held}) for it: pass "):
        feed(student, tokens(), make_cache(student.config))


def test_a_mixer_layer_takes_no_keys_and_values(make_student):
    with pytest.raises(TypeError, match="a mixer layer keeps no keys and values"):
        make_student().new_cache().update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
