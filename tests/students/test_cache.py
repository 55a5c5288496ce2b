"""The cache of a student: what it holds, how it is reordered and reset, and which caches are refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, StaticCache

from transpoint.students import HybridCache

MIXERS = (0, 2, 3)  # of a student that keeps attention in layer 1


def tokens(batch=2, length=9, seed=0):
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(student, ids, cache):
    return student(ids, cache=cache).logits


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


def test_a_quantized_cache_is_refused_in_generation_naming_what_to_leave_out(make_student):
    with pytest.raises(ValueError) as caught:
        make_student().generate(tokens(), max_new_tokens=4, cache_implementation="quantized")
    assert str(caught.value) == (
        "cache_implementation='quantized' is not possible for a hybrid, whose mixer layers keep a state: leave it out, "
        "or take 'static'"
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


def test_a_mamba2_students_cache_is_refused_by_a_transmamba_student(make_student):
    other = make_student(keep_attention=()).new_cache()
    with pytest.raises(TypeError, match="^layer 0 is a mixer, but the cache holds a StateLayer for it: pass "):
        feed(make_student(mixer="transmamba", keep_attention=(), trans_points=3), tokens(), other)


def test_a_mixer_layer_takes_no_keys_and_values(make_student):
    with pytest.raises(TypeError, match="a mixer layer keeps no keys and values"):
        make_student().new_cache().update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)


# Forking, saving and loading

CONTINUED = {
    "mamba2": {},
    "mamba2 and a window": {"family": "mistral"},
    "all mamba2": {"keep_attention": ()},
    "before the TransPoints": {"mixer": "transmamba", "trans_points": 30, "conv_kernel": 4},
    "at and between them": {"mixer": "transmamba", "trans_points": [0, 5, 9, 12], "keep_attention": ()},
    "after them": {"mixer": "transmamba", "trans_points": 4, "gate": True, "conv_kernel": 2},
    "without TransPoints": {"family": "mistral", "mixer": "transmamba", "trans_points": "inf", "keep_attention": ()},
}
continued = pytest.mark.parametrize("case", CONTINUED.values(), ids=CONTINUED.keys())


def prefix(student, length=9):
    """A cache after a batch whose second row is padded on the left, and its mask."""
    ids, mask, cache = tokens(length=length), torch.ones(2, length, dtype=torch.long), student.new_cache()
    mask[1, :4] = 0
    with torch.no_grad():
        student(ids, attention_mask=mask, cache=cache)
    return cache, mask


@torch.no_grad()
def go_on(student, cache, mask, seed, rows=2, length=21):
    """Logits of more tokens, one by one: past window and TransPoints."""
    found, ids = [], tokens(rows, length, seed)
    for t in range(length):
        mask = torch.cat((mask, torch.ones(rows, 1, dtype=torch.long)), 1)
        found.append(student(ids[:, t : t + 1], attention_mask=mask, cache=cache).logits)
    return torch.cat(found, 1)


@continued
def test_a_fork_continues_exactly_as_the_original_and_neither_touches_the_other(make_student, case):
    student = make_student(**case)
    expected = [go_on(student, *prefix(student), seed) for seed in (1, 2)]
    cache, mask = prefix(student)
    fork, later = cache.fork(), cache.fork()
    assert isinstance(fork, HybridCache) and fork.get_seq_length() == 9
    assert torch.equal(go_on(student, fork, mask, 1), expected[0])
    assert torch.equal(go_on(student, cache, mask, 2), expected[1])
    assert torch.equal(go_on(student, later, mask, 1), expected[0])


@continued
def test_one_prefix_is_continued_several_ways(make_student, case):
    student = make_student(**case)
    cache, mask = prefix(student)
    fork = cache.fork(copies=3)
    found = go_on(student, fork, mask.repeat_interleave(3, 0), 1, rows=6)
    ids = tokens(6, 21, 1)
    for copy in range(3):
        with torch.no_grad():
            own = student(
                torch.cat((tokens(length=9), ids[copy::3]), 1),
                attention_mask=torch.cat((mask, mask.new_ones(2, 21)), 1),
            )
        assert_near(found[copy::3], own.logits[:, 9:])
    assert cache.get_seq_length() == 9 and all(len(t) == 2 for layer in cache.layers for t in held(layer))


def held(layer):
    return [value for value in vars(layer).values() if isinstance(value, torch.Tensor) and value.ndim > 1]


def test_a_fork_shares_no_memory(make_student):
    cache, _ = prefix(make_student(mixer="transmamba", trans_points=[0, 5, 7, 30], conv_kernel=4))
    fork = cache.fork()
    for layer, own in zip(fork.layers, cache.layers, strict=True):
        assert len(held(layer)) == len(held(own)) > 0
        assert not {t.data_ptr() for t in held(layer)} & {t.data_ptr() for t in held(own)}


def test_a_cache_filled_with_gradients_can_be_forked_and_saved(make_student, tmp_path):
    student, ids = make_student(mixer="transmamba", trans_points=4), tokens()
    cache = student.new_cache()
    student(ids, cache=cache)
    assert cache.fork().layers[0].ssm_state.requires_grad
    cache.save(tmp_path / "cache.safetensors")


@pytest.mark.parametrize("copies", [0, -1])
def test_a_fork_has_at_least_one_copy(make_student, copies):
    with pytest.raises(ValueError, match=f"^copies: expected at least 1, got {copies}$"):
        make_student().new_cache().fork(copies)


@continued
def test_a_saved_cache_continues_exactly(make_student, case, tmp_path):
    student = make_student(**case)
    cache, mask = prefix(student)
    cache.save(tmp_path / "cache.safetensors")
    expected = go_on(student, cache, mask, 1)
    for _ in range(2):
        loaded = HybridCache.load(tmp_path / "cache.safetensors", student.config)
        assert loaded.get_seq_length() == 9
        assert torch.equal(go_on(student, loaded, mask, 1), expected)


def test_a_saved_cache_is_one_safetensors_file_that_says_what_it_is(make_student, tmp_path):
    student = make_student(mixer="transmamba", trans_points=[0, 5, "inf", 30])
    prefix(student)[0].save(tmp_path / "cache.safetensors")
    with safe_open(tmp_path / "cache.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert names == {"0.ssm_state", "1.keys", "1.values", "2.keys", "2.values", "2.real"} | {
        f"3.{name}" for name in ("keys", "values", "real", "dt")
    }
    assert json.loads(metadata["for"])["trans_points"] == [0, "inf", "inf", 30]
    assert json.loads(metadata["layers"])[3]["tokens"] == [9, 5]


def test_an_empty_cache_is_saved_too(make_student, tmp_path):
    student = make_student()
    student.new_cache().save(tmp_path / "cache.safetensors")
    loaded = HybridCache.load(tmp_path / "cache.safetensors", student.config)
    assert torch.equal(feed(student, tokens(), loaded), feed(student, tokens(), student.new_cache()))


@pytest.mark.parametrize(
    "other, reason",
    [
        ({"trans_points": 5}, r"whose trans_points is \[4, 'inf', 4, 4\], this one's is \[5, 'inf', 5, 5\]"),
        ({"keep_attention": (2,)}, "whose mixers is .*, this one's is "),
        ({"gate": True}, "whose mixer_options is .*, this one's is "),
        ({"sizes": {"num_key_value_heads": 4}}, "whose num_key_value_heads is 2, this one's is 4"),
        ({"family": "qwen2"}, "whose base_model_type is llama, this one's is qwen2"),
        ({"sizes": {"head_dim": 32}}, "whose head_dim is 16, this one's is 32"),
        ({"sizes": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}}, "whose rope_parameters is .*7.0"),
    ],
)
def test_the_cache_of_another_model_is_not_loaded(make_student, tmp_path, other, reason):
    options = {"mixer": "transmamba", "trans_points": 4}
    path = tmp_path / "cache.safetensors"
    make_student(**options).new_cache().save(path)
    with pytest.raises(ValueError, match=f"^'.*cache.safetensors' is of a model {reason}"):
        HybridCache.load(path, make_student(**(options | other)).config)


def test_a_file_that_is_no_cache_is_refused(make_student, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="weights.safetensors' holds no cache that HybridCache.save has written"):
        HybridCache.load(tmp_path / "weights.safetensors", make_student().config)


def test_the_cache_of_a_model_with_another_window_is_not_loaded(make_student, tmp_path):
    path = tmp_path / "cache.safetensors"
    filled(make_student("mistral"), tokens()).save(path)
    with pytest.raises(ValueError, match="is of a model whose sliding_window is 16, this one's is 8"):
        HybridCache.load(path, make_student("mistral", sizes={"sliding_window": 8}).config)


def test_a_cache_is_loaded_for_a_saved_config(make_student, tmp_path):
    student = make_student("qwen3", mixer="transmamba", trans_points=[0, 5, "inf", 30])
    filled(student, tokens()).save(tmp_path / "cache.safetensors")
    student.config.save_pretrained(tmp_path)
    loaded = HybridCache.load(tmp_path / "cache.safetensors", type(student.config).from_pretrained(tmp_path))
    assert loaded.get_seq_length() == 9


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["nothing", "4 bytes", "100 bytes", "all but one byte"])
def test_a_truncated_file_is_refused(make_student, tmp_path, kept):
    student, path = make_student(), tmp_path / "cache.safetensors"
    filled(student, tokens()).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="^'.*cache.safetensors' is no safetensors file, or a damaged one .*: save it"):
        HybridCache.load(path, student.config)


@pytest.mark.parametrize("case", [{}, {"mixer": "transmamba", "trans_points": 30}], ids=["mamba2", "transmamba"])
def test_a_cache_in_another_dtype_than_the_model_is_refused(make_student, tmp_path, case):
    student, path = make_student(**case), tmp_path / "cache.safetensors"
    filled(student, tokens()).save(path)
    expected = (
        "holds torch.float32, the model is in torch.bfloat16: load the model in the cache's dtype, or pass dtype="
    )
    student.bfloat16()
    with pytest.raises(ValueError, match=expected):
        HybridCache.load(path, student.config, dtype=student.dtype)
    filled(student, tokens()).save(path)
    with pytest.raises(ValueError, match="holds torch.bfloat16, the model is in torch.float32"):
        HybridCache.load(path, student.config)
    assert HybridCache.load(path, student.config, dtype=student.dtype).get_seq_length() == 9


def test_a_window_does_not_hold_the_whole_prompt(make_student):
    """In bytes of storage: a view of the last keys would keep all of them."""
    student = make_student("mistral", keep_attention=(), mixer="transmamba", trans_points="inf")
    cache = filled(student, tokens(length=200))
    assert [bytes_held(layer) for layer in cache.layers] == [2 * 2 * 15 * 2 * 16 * 4] * 4
