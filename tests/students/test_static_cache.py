"""A static cache: what is decoded with it is what is decoded with one that grows, in tensors that stay where they are,
and a step of it is compiled once."""

import pytest
import torch
from decoding import LENGTH, assert_near, in_pieces, logits, tokens
from torch._dynamo.utils import counters
from transformers import CompileConfig

from transpoint.students import HybridCache

pytestmark = pytest.mark.stack

PAD = 7
OF = {
    "mamba2": {},
    "all mixers": {"keep_attention": ()},
    "window in attention": {"family": "mistral"},
    "norms": {"family": "qwen3", "mixer": "gdn"},
    "s4d": {"mixer": "s4d", "state_size": 8},
    "Mamba-1": {"mixer": "mamba1"},
    "window": {"mixer": "window_mamba2", "window": 5, "sinks": 2},
    "window, without sinks": {"mixer": "window_gdn", "window": 3, "sinks": 0, "keep_attention": ()},
    "past its TransPoints": {"keep_attention": (), "mixer": "transmamba", "trans_points": 4},
}
students = pytest.mark.parametrize("options", OF.values(), ids=OF.keys())


@pytest.fixture(scope="module")
def make_student(make_student):
    """In float64, where a difference is a mistake and not rounding."""
    return lambda **options: make_student(**options).double()


def left_padded():
    ids, mask = tokens(length=9), torch.ones(2, 9, dtype=torch.long)
    ids[0, :4], mask[0, :4] = PAD, 0
    return ids, mask


def generate(student, ids, mask, **options):
    options = {"do_sample": False, "max_new_tokens": 10, **options}
    return student.generate(ids, attention_mask=mask, eos_token_id=None, pad_token_id=PAD, **options)


def addresses(cache):
    return [
        {name: value.data_ptr() for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
        for layer in cache.layers
    ]


@pytest.mark.slow
@students
@pytest.mark.parametrize(
    ("prompts", "more"),
    [
        ((tokens(length=9), None), {"num_beams": 3}),
        (left_padded(), {"prefill_chunk_size": 5}),
    ],
    ids=["beams without padding", "padded, in chunks"],
)
def test_generation_is_that_of_a_cache_that_grows(make_student, options, prompts, more, caplog):
    student = make_student(**options)
    assert torch.equal(
        generate(student, *prompts, cache_implementation="static", **more), generate(student, *prompts, **more)
    )
    assert not caplog.records


@pytest.mark.parametrize("static", [False, True])
@students
def test_generation_from_embeddings_is_that_from_tokens(make_student, options, static):
    student, (ids, mask) = make_student(**options), left_padded()
    more = {"cache_implementation": "static"} if static else {}
    embedded = {"inputs_embeds": student.get_input_embeddings()(ids), "attention_mask": mask, **more}
    found = student.generate(**embedded, do_sample=False, max_new_tokens=10, eos_token_id=None, pad_token_id=PAD)
    assert torch.equal(found, generate(student, ids, mask)[:, 9:])


@pytest.mark.parametrize("kind", ["past its TransPoints", "window, without sinks"])
@torch.no_grad()
def test_padding_in_a_later_piece_is_padding(make_student, kind):
    """Also after the cache is fixed, and where a window that comes next reaches beyond it. Past its TransPoint a
    student's state is all that it remembers."""
    student, ids = make_student(**OF[kind]), tokens(length=15)
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, 9:12] = 0
    positions = mask.cumsum(1) - 1
    found = []
    for cache in (student.new_cache(), student.new_cache(max_cache_len=LENGTH)):
        for start, end in ((0, 9), (9, 13), (13, 15)):
            told = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            last = student(ids[:, start:end], cache=cache, **told).logits[:, -1]
        found.append(last)
    assert_near(found[1], found[0])
    assert_near(found[1][0], logits(student, torch.cat((ids[:1, :9], ids[:1, 12:]), 1))[0, -1])


@students
def test_logits_in_pieces_are_those_of_one_pass(make_student, options):
    student, ids = make_student(**options), tokens()
    found = in_pieces(student, ids, [9, 1, 1, 4, 1, 1, 7], cache=student.new_cache(max_cache_len=LENGTH))
    assert_near(found, logits(student, ids))


@students
@torch.no_grad()
def test_tensors_stay_where_they_are_once_the_prompt_is_read(make_student, options):
    student, ids = make_student(**options), tokens()
    cache = student.new_cache(max_cache_len=LENGTH)
    assert cache.is_compileable and not cache.fixed
    student(ids[:, :9], cache=cache)
    held = addresses(cache)
    assert cache.fixed and all(held)
    for t in range(9, LENGTH):
        student(ids[:, t : t + 1], cache=cache)
    assert addresses(cache) == held
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [LENGTH] * len(cache.layers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba2", "past its TransPoints", "window"])
def test_a_step_is_compiled_once_and_whole(make_student, kind):
    student = make_student(**OF[kind], sizes={"num_hidden_layers": 2}).float()
    how = CompileConfig(fullgraph=True, backend="eager", mode=None)
    how._compile_all_devices = True
    counters.clear()
    for longest in (15, 12):
        options = {"max_new_tokens": longest, "cache_implementation": "static"}
        expected = generate(student, *left_padded(), **options)
        assert torch.equal(generate(student, *left_padded(), compile_config=how, **options), expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@students
@torch.no_grad()
def test_a_cache_is_continued_more_than_once(make_student, options, tmp_path):
    student, ids = make_student(**options), tokens(length=14)
    cache = student.new_cache(max_cache_len=LENGTH)
    student(ids[:, :9], cache=cache)
    cache.save(tmp_path / "cache")
    loaded = HybridCache.load(tmp_path / "cache", student.config, dtype=student.dtype)
    forked, twice = cache.fork(), cache.fork(2)
    expected = in_pieces(student, ids[:, 9:], [1] * 5, cache=cache)
    for other in (forked, loaded):
        assert other.fixed and other.static_length == LENGTH
        held = addresses(other)
        assert torch.equal(in_pieces(student, ids[:, 9:], [1] * 5, cache=other), expected)
        assert addresses(other) == held
    assert_near(in_pieces(student, ids[[0, 0, 1, 1], 9:], [1] * 5, cache=twice), expected[[0, 0, 1, 1]])
    twice.batch_select_indices(torch.tensor([3, 0]))
    assert twice.batch_size == 2 or not student.config.mixers.count("attention")
    cache.reset()
    assert_near(in_pieces(student, ids, [9, 5], cache=cache), logits(student, ids))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"mixer": "softmax"}, "a layer of softmax has no static memory"),
        (
            {"mixer": "transmamba", "trans_points": 6},
            "the shortest prompt has 5 tokens, and the last TransPoint is at 6",
        ),
    ],
    ids=["growing", "before its TransPoints"],
)
def test_where_it_cannot_be_a_growing_one_is_taken_and_it_is_said(make_student, options, reason, caplog):
    student = make_student(**options)
    with caplog.at_level("WARNING", logger="transformers"):
        found = generate(student, *left_padded(), cache_implementation="static")
    assert torch.equal(found, generate(student, *left_padded()))
    said = [record.getMessage() for record in caplog.records]
    assert f"cache_implementation='static': {reason}; the cache that grows is taken instead" in said
    if "memory" not in reason:
        with pytest.raises(ValueError, match=f"^a static cache was passed, but {reason}: pass new_cache.. without"):
            generate(student, *left_padded(), past_key_values=student.new_cache(max_cache_len=LENGTH))
    else:
        with pytest.raises(ValueError, match=f"^{reason}: leave max_cache_len out$"):
            student.new_cache(max_cache_len=8)


@torch.no_grad()
def test_a_compiled_step_makes_no_copies_of_keys_for_the_heads_that_share_them(make_student):
    student, ids = make_student(sizes={"num_hidden_layers": 2}), tokens()
    cache, shapes = student.new_cache(max_cache_len=512), []

    def look(graph, inputs):
        made = [node.meta.get("example_value") for node in graph.graph.nodes]
        shapes.extend(one.shape for one in made if isinstance(one, torch.Tensor) and one.ndim >= 4)
        return graph

    student(ids[:, :9], cache=cache)
    want = logits(student, ids)
    step = torch.compile(student.forward, backend=look, fullgraph=True, dynamic=False)
    assert_near(step(ids[:, 9:10], cache=cache).logits[:, 0], want[:, 9])
    heads, kept = student.config.num_attention_heads, student.config.num_key_value_heads
    assert heads > kept and (2, kept, 512) in {shape[:3] for shape in shapes}
    assert (2, heads, 512) not in {shape[:3] for shape in shapes} and not any(len(shape) > 4 for shape in shapes)
