"""A student that decodes by tokens or chunks, with padding or by generate(), computes what one forward pass does."""

import pytest
import torch
from decoding import LENGTH, logits, tokens

pytestmark = pytest.mark.stack

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
KEEP = {"hybrid": (1,), "attention first": (0, 2), "all mixers": ()}
SHIFTED = 1e-5  # between a row and itself at other positions: rotary tables are float32
PAD = 7  # not that of the config: its embedding is zero, which needs no mask

families = pytest.mark.parametrize("family", FAMILIES)
hybrids = pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP.keys())


@pytest.fixture(scope="module")
def make_student(make_student):
    """In float64, where a difference is a mistake and not rounding."""
    return lambda *args, **kwargs: make_student(*args, **kwargs).double()


@torch.no_grad()
def in_pieces(student, ids, sizes, mask=None):
    """Logits of tokens that come in pieces, with a cache between them."""
    cache, start, found = student.new_cache(), 0, []
    for size in sizes:
        end = start + size
        seen = None if mask is None else mask[:, :end]
        found.append(student(ids[:, start:end], cache=cache, attention_mask=seen).logits)
        start = end
    assert start == ids.shape[1] and cache.get_seq_length() == start
    return torch.cat(found, 1)


def assert_near(found, expected, tolerance=1e-9):
    assert (found - expected).norm() / expected.norm() < tolerance


PIECES = {
    "token by token": [1] * LENGTH,
    "prefill, then tokens": [LENGTH - 4, 1, 1, 1, 1],
    "in chunks": [9, 2, 13],
    "chunks and tokens": [1, 2, 1, 7, 1, 1, 8, 3],
}


@hybrids
@pytest.mark.parametrize(
    ("family", "pieces"),
    [*(("qwen3", way) for way in PIECES), *((family, "chunks and tokens") for family in FAMILIES if family != "qwen3")],
)
def test_decoding_in_pieces_equals_a_full_forward(make_student, family, keep, pieces):
    student, ids, pieces = make_student(family, keep), tokens(), PIECES[pieces]
    assert_near(in_pieces(student, ids, pieces), logits(student, ids))
    student = student.float()
    assert_near(in_pieces(student, ids, pieces), logits(student, ids), tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"gate": False, "norm": False, "conv_activation": None}, {"expand_kv": True, "state_factor": 2}],
    ids=["all parts", "bare", "large"],
)
def test_decoding_in_pieces_equals_a_full_forward_with_every_option(make_student, kernel, rope, options):
    if kernel == 1 and "state_factor" in options:
        options = {"expand_kv": True}
    student, ids = make_student("qwen3", (1,), conv_kernel=kernel, rope=rope, **options), tokens()
    expected = logits(student, ids)
    for way in ("in chunks", "chunks and tokens"):
        assert_near(in_pieces(student, ids, PIECES[way]), expected)


def test_a_stirred_student_looks_back_through_its_convolution_and_state(make_student):
    """So that the tests here would see a cache that forgets."""
    student, ids = make_student(keep_attention=()), tokens()
    with torch.no_grad():
        forgetful = student(ids[:, -1:], use_cache=False).logits
    assert (forgetful[:, 0] - logits(student, ids)[:, -1]).norm() / forgetful.norm() > 0.1


@torch.no_grad()
def generate(student, ids, use_cache, seed=0, **kwargs):
    """Generated ids, and how many tokens each forward pass took."""
    lengths = []
    hook = student.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    torch.manual_seed(seed)
    found = student.generate(ids, max_new_tokens=10, eos_token_id=None, pad_token_id=PAD, use_cache=use_cache, **kwargs)
    hook.remove()
    return found, lengths


GENERATION = {
    "greedy": {"do_sample": False},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beams returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True},
    "three samples each": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.slow
@hybrids
@pytest.mark.parametrize("kwargs", GENERATION.values(), ids=GENERATION.keys())
def test_generation_with_a_cache_equals_generation_without(make_student, keep, kwargs):
    student, ids = make_student("qwen3", keep), tokens(length=7)
    mask = torch.ones_like(ids)
    cached, lengths = generate(student, ids, True, attention_mask=mask, **kwargs)
    plain, plain_lengths = generate(student, ids, False, attention_mask=mask, **kwargs)
    assert cached.shape == (2 * kwargs.get("num_return_sequences", 1), 17)
    assert torch.equal(cached, plain)
    assert lengths == [7] + [1] * 9 and plain_lengths == list(range(7, 17))


def test_samples_of_one_prompt_differ(make_student):
    samples, _ = generate(make_student(), tokens(1, 7), True, do_sample=True, num_return_sequences=3)
    assert len({tuple(sample.tolist()) for sample in samples}) == 3


def test_beam_search_finds_another_sequence_than_greedy_search(make_student):
    """So that the beams were reordered on the way."""
    student, ids = make_student(keep_attention=()), tokens(length=7)
    reordered = []
    cache = student.new_cache()
    reorder = cache.reorder_cache
    cache.reorder_cache = lambda index: (reordered.append(index.tolist()), reorder(index))
    beams, _ = generate(student, ids, True, do_sample=False, num_beams=3, past_key_values=cache)
    plain, _ = generate(student, ids, False, do_sample=False, num_beams=3)
    assert any(index != list(range(6)) for index in reordered)
    assert torch.equal(beams, plain)


def test_generation_in_prefill_chunks_equals_generation_at_once(make_student):
    student, ids = make_student(), tokens(length=11)
    whole, _ = generate(student, ids, True, do_sample=False)
    chunked, lengths = generate(student, ids, True, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(chunked, whole) and lengths[:3] == [4, 4, 3]


def padded(rows, side):
    """Rows of token ids of any length as a batch, and its mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def rows_of(*lengths):
    return [tokens(1, length, seed=length)[0] for length in lengths]


@families
@hybrids
@pytest.mark.parametrize("side", ["left", "right"])
def test_real_tokens_of_a_padded_batch_have_the_logits_of_unpadded_rows(make_student, family, keep, side):
    student, rows = make_student(family, keep, rope=True), rows_of(5, 20, 13)
    ids, mask = padded(rows, side)
    found = logits(student, ids, attention_mask=mask)
    unmasked = logits(student, ids)
    for i, row in enumerate(rows):
        expected = logits(student, row[None])[0]
        assert_near(found[i][mask[i] == 1], expected, SHIFTED)
        if side == "left" and len(row) < 20:  # the mask was needed
            assert (unmasked[i][mask[i] == 1] - expected).norm() / expected.norm() > 1e-3


@pytest.mark.parametrize(
    ("family", "keep"), [*((family, (1,)) for family in FAMILIES), ("qwen3", (0, 2)), ("qwen3", ())], ids=str
)
def test_greedy_generation_of_a_left_padded_batch_equals_that_of_each_row(make_student, family, keep):
    student, rows = make_student(family, keep, rope=True), rows_of(3, 12, 7)
    ids, mask = padded(rows, "left")
    cached, plain = (generate(student, ids, use, attention_mask=mask, do_sample=False)[0] for use in (True, False))
    for i, row in enumerate(rows):
        alone, _ = generate(student, row[None], True, attention_mask=torch.ones(1, len(row)), do_sample=False)
        assert torch.equal(cached[i, 12:], alone[0, len(row) :]) and torch.equal(plain[i], cached[i])


@hybrids
def test_a_left_padded_batch_in_chunks_equals_unpadded_rows(make_student, keep):
    student, rows = make_student("llama", keep), rows_of(5, 20, 13)
    ids, mask = padded(rows, "left")
    found = in_pieces(student, ids, [6, 9, 3, 1, 1], mask)
    for i, row in enumerate(rows):
        assert_near(found[i][mask[i] == 1], logits(student, row[None])[0], SHIFTED)


@hybrids
def test_a_left_padded_batch_token_by_token_equals_unpadded_rows(make_student, keep):
    """Its first columns are padding in some rows and a token in another."""
    student, rows = make_student("llama", keep), rows_of(5, 20, 13)
    ids, mask = padded(rows, "left")
    found = in_pieces(student, ids, [1] * 20, mask)
    for i, row in enumerate(rows):
        assert_near(found[i][mask[i] == 1], logits(student, row[None])[0], SHIFTED)


@torch.no_grad()
def test_no_token_waits_for_the_device_once_all_rows_have_begun(make_student, monkeypatch):
    """Reading a tensor's content on the host would: item, tolist, and with them any `if` on it."""
    student = make_student(keep_attention=())
    ids, mask = padded(rows_of(8, 14), "left")
    cache, read = student.new_cache(), []
    student(ids[:, :7], cache=cache, attention_mask=mask[:, :7])
    assert [layer.tokens for layer in cache.layers] == [[1, 7]] * 4
    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, method=method, name=name: (read.append(name), method(*args))[1]
        )
    for t in range(7, 14):
        hidden = student.model.embed_tokens(ids[:, t : t + 1])
        for mixer in student.mixer_layers():
            mixer(hidden, cache=cache, padding_mask=mask[:, : t + 1])
    assert not read and [layer.tokens for layer in cache.layers] == [[8, 14]] * 4


@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (2, 9, 9)])
@pytest.mark.parametrize("mixer", ["mamba2", "transmamba"])
def test_a_mask_of_pairs_is_refused_where_there_are_mixers(make_student, mixer, shape):
    found = ", ".join(map(str, shape))
    expected = rf"^mixer layers know padding alone: expected an attention_mask .*, got one of shape \({found}\)$"
    with pytest.raises(ValueError, match=expected):
        make_student(mixer=mixer)(tokens(length=9), attention_mask=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match="got one that is a dict$"):
        make_student(mixer=mixer)(tokens(length=9), attention_mask={"full_attention": None})
