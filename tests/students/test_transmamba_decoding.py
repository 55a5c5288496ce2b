"""TransMamba students that decode across their TransPoints compute what one forward pass does, and forget the keys."""

import pytest
import torch
from decoding import LENGTH, assert_near, in_pieces, logits, stirred, tokens
from hypothesis import given, settings, strategies as st

from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher

PAD = 7  # not that of the config: its embedding is zero, which needs no mask
ALL_PARTS = {"conv_kernel": 4, "conv_activation": "silu", "gate": True, "norm": True}
STUDENTS = {
    "llama": ("llama", {}),
    "all parts": ("qwen2", ALL_PARTS),
    "kept attention": ("qwen3", {"keep_attention": [1]}),
    "window": ("mistral", {}),
    "no rope, no norms": ("qwen3", {"rope": False, "qk_norm": False}),
    "window in one layer, kept in another": ("mistral", {"keep_attention": [2], "conv_kernel": 2}),
}


def build(family, points="inf", sizes=None, **options):
    """In float64, where a difference is a mistake and not rounding; what as transferred does nothing is stirred."""
    teacher, _ = random_teacher(f"random-{family}", **(sizes or {}))
    options = {"keep_attention": [], **options}
    student = build_student(teacher, StudentConfig(mixer="transmamba", trans_points=points, **options))
    return stirred(student).double()


@pytest.fixture(scope="module", params=STUDENTS.values(), ids=STUDENTS.keys())
def student(request):
    family, options = request.param
    return build(family, **options)


def pieces_of(draw, length):
    """Sizes of pieces, single tokens often among them."""
    sizes = []
    while (left := length - sum(sizes)) > 0:
        sizes.append(draw(st.one_of(st.just(1), st.integers(1, left))))
    return sizes


PIECES = {
    "token by token": [1] * LENGTH,
    "in chunks": [9, 2, 13],
}


@pytest.mark.slow
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES.keys())
def test_decoding_across_trans_points_equals_a_full_forward(student, pieces):
    ids, left = tokens(), [0, 1, 2, 3, 8, 9, 10, 11, 12, LENGTH - 1, LENGTH, LENGTH + 1, "inf"]  # ends of pieces
    while left:  # each in some layer, as many at once as there are mixers
        mixers = student.mixer_layers()
        student.set_trans_points([left.pop() if mixer and left else "inf" for mixer in mixers], warn=False)
        assert_near(in_pieces(student, ids, pieces), logits(student, ids))


points_of_layers = st.lists(st.one_of(st.integers(0, 26), st.just("inf")), min_size=4, max_size=4)


@settings(max_examples=8)
@given(data=st.data(), points=points_of_layers, length=st.integers(1, 30))
def test_decoding_in_any_pieces_with_any_points_equals_a_full_forward(student, data, points, length):
    student.set_trans_points(points, warn=False)
    ids = tokens(2, length, seed=length)
    assert_near(in_pieces(student, ids, pieces_of(data.draw, length)), logits(student, ids))


def padded(rows):
    """Rows of token ids of any length, padded on the left, and the mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return ids, mask


@pytest.mark.slow
@settings(max_examples=8)
@given(data=st.data(), points=points_of_layers, lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_rows_of_a_left_padded_batch_pass_their_points_each_in_its_turn(student, data, points, lengths):
    student.set_trans_points(points, warn=False)
    rows = [tokens(1, length, seed=length)[0] for length in lengths]
    ids, mask = padded(rows)
    found = in_pieces(student, ids, pieces_of(data.draw, ids.shape[1]), mask)
    for i, row in enumerate(rows):
        assert_near(found[i][mask[i] == 1], logits(student, row[None])[0])


# generate()


@torch.no_grad()
def generate(student, ids, use_cache, seed=0, **kwargs):
    torch.manual_seed(seed)
    return student.generate(ids, max_new_tokens=12, eos_token_id=None, pad_token_id=PAD, use_cache=use_cache, **kwargs)


GENERATION = {
    "greedy": {"do_sample": False},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beams returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "three samples each": {"do_sample": True, "num_return_sequences": 3},
    "prefill in chunks": {"do_sample": False, "prefill_chunk_size": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", GENERATION.values(), ids=GENERATION.keys())
def test_generation_with_a_cache_equals_generation_without(kwargs):
    """Of one student: the ways are of the cache, which the tests above have for each."""
    student = build("mistral", [0, 8, 14, "inf"], conv_kernel=2)  # before, at and after the end of the prompt
    ids = tokens(length=7)
    mask = torch.ones_like(ids)
    plain = {name: value for name, value in kwargs.items() if name != "prefill_chunk_size"}
    found = generate(student, ids, True, attention_mask=mask, **kwargs)
    assert torch.equal(found, generate(student, ids, False, attention_mask=mask, **plain))
    assert found.shape == (2 * kwargs.get("num_return_sequences", 1), 19)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("points", "kwargs"), [([0, 3, 9, 14], {"num_beams": 3}), ([10, 15, "inf", 6], {})], ids=["beam search", "greedy"]
)
def test_generation_of_a_left_padded_batch_equals_that_of_each_row(student, points, kwargs):
    """With beams, rows that pass their TransPoints at different steps are reordered in between."""
    student.set_trans_points(points, warn=False)
    rows = [tokens(1, length, seed=length)[0] for length in (3, 11, 7)]
    ids, mask = padded(rows)
    found = generate(student, ids, True, attention_mask=mask, do_sample=False, **kwargs)
    for i, row in enumerate(rows):
        alone = generate(student, row[None], True, attention_mask=torch.ones(1, len(row)), do_sample=False, **kwargs)
        assert torch.equal(found[i, 11:], alone[0, len(row) :])


REARRANGED = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@torch.no_grad()
@pytest.mark.parametrize("change, rows", REARRANGED.values(), ids=REARRANGED.keys())
@pytest.mark.parametrize("point", [3, 6, 10, 12, 30])
def test_rows_that_pass_their_points_at_different_steps_can_be_rearranged(change, rows, point):
    student = build("qwen3", point)
    prompts = [tokens(1, length, seed=length)[0] for length in (3, 11, 7)]
    ids, mask = padded(prompts)
    cache, more = student.new_cache(), tokens(len(rows), 9, seed=1)
    in_pieces(student, ids, [11], mask, cache)
    change(cache)
    mask = torch.cat((mask[rows], mask.new_ones(more.shape)), 1)
    found = []
    for t in range(9):
        seen = mask[:, : 12 + t]
        positions = seen.sum(1, keepdim=True) - 1
        step = {"attention_mask": seen, "position_ids": positions, "cache": cache}
        found.append(student(more[:, t : t + 1], **step).logits)
    for i, row in enumerate(rows):
        expected = logits(student, torch.cat((prompts[row], more[i]))[None])
        assert_near(torch.cat(found, 1)[i], expected[0, len(prompts[row]) :])
    assert [layer.tokens for layer in cache.layers] == [[len(prompts[row]) + 9 for row in rows]] * 4


# What is held


def bytes_held(layer):
    tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


STATE = 2 * 4 * 16 * 16 * 8  # batch, heads, head_dim, state; float64 here
COLUMN = 2 * 8 * (2 * 2 * 16 + 4)  # batch; keys and values of 2 heads, steps of 4


@torch.no_grad()
def test_keys_and_values_are_held_up_to_the_trans_point_and_a_state_after_it():
    student, ids = build("llama", [0, 5, 9, "inf"]), tokens(length=14)
    cache = student.new_cache()
    for t in range(14):
        student(ids[:, t : t + 1], cache=cache)
        seen = t + 1
        held = [bytes_held(layer) for layer in cache.layers]
        expected = [STATE if seen >= point else seen * COLUMN for point in (0, 5, 9)]
        assert held == [*expected, seen * 2 * 8 * 2 * 2 * 16], seen
    assert cache.get_seq_length() == 14


@pytest.mark.slow
@torch.no_grad()
def test_memory_is_constant_over_256_tokens_after_the_trans_point():
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 8192}
    student = build("llama", [0, 32], sizes, **ALL_PARTS)
    cache, ids = student.new_cache(), tokens(1, 256 + 33)
    student(ids[:, :32], cache=cache)
    sizes = set()
    for t in range(32, ids.shape[1]):
        student(ids[:, t : t + 1], cache=cache)
        sizes.add(sum(bytes_held(layer) for layer in cache.layers))
    state, tail = 2 * 8 * 8 * 8, (2 + 2) * 8 * 3 * 8
    assert sizes == {2 * (state + tail)} and cache.get_seq_length() == ids.shape[1]


@torch.no_grad()
def test_a_window_bounds_the_keys_of_layers_without_a_trans_point():
    student, ids = build("mistral", "inf"), tokens(length=40)
    cache = student.new_cache()
    for start in range(0, 40, 4):
        student(ids[:, start : start + 4], cache=cache)
        assert [layer.keys.shape[1] for layer in cache.layers] == [min(start + 4, 15)] * 4
    assert cache.get_seq_length() == 40


@torch.no_grad()
def test_keys_of_a_batch_are_held_until_its_last_row_has_reached_the_trans_point():
    student = build("llama", 6)
    ids, mask = padded([tokens(1, 7)[0], tokens(1, 4)[0]])
    cache, held = student.new_cache(), []
    student(ids, cache=cache, attention_mask=mask)
    for t in range(4):
        layer = cache.layers[2]
        held.append((layer.tokens, layer.keys is not None, layer.dt is not None, layer.ssm_state is not None))
        student(tokens(2, 1, seed=t), cache=cache, attention_mask=torch.cat((mask, torch.ones(2, t + 1)), 1))
    assert held == [([7, 4], True, False, True), ([8, 5], True, False, True)] + [
        ([n, n - 3], False, False, True) for n in (9, 10)
    ]


def test_no_token_after_the_prefill_waits_for_the_device(monkeypatch):
    """Reading a tensor's content on the host would: item, tolist, and with them any `if` on it."""
    student, ids = build("llama", [0, 5, 9, "inf"]), tokens(length=14)
    cache = student.new_cache()
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        student(ids[:, :4], cache=cache, attention_mask=mask[:, :4])
    read = []
    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, method=method, name=name: (read.append(name), method(*args))[1]
        )
    mixers = student.mixer_layers()
    with torch.no_grad():
        for t in range(4, 14):
            hidden = student.model.embed_tokens(ids[:, t : t + 1])
            rotary = student.model.rotary_emb(hidden, torch.tensor([[t]]))
            for mixer in mixers:
                mixer(hidden, rotary, cache=cache, padding_mask=mask[:, : t + 1])
    assert not read and [layer.tokens for layer in cache.layers] == [[12, 14]] * 4


def test_a_cache_goes_on_only_with_the_trans_points_it_was_filled_with(student):
    student.set_trans_points(5, warn=False)
    cache = student.new_cache()
    in_pieces(student, tokens(), [LENGTH], cache=cache)
    student.set_trans_points(9, warn=False)
    with pytest.raises(ValueError, match="filled with TransPoint 5 and the layer now has 9: start a new cache after"):
        in_pieces(student, tokens(), [LENGTH], cache=cache)
    cache.reset()
    assert_near(in_pieces(student, tokens(), [LENGTH], cache=cache), logits(student, tokens()))
