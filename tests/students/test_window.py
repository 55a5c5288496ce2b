"""Window and state side by side: an independent sum of both, the teacher's attention, and decoding."""

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
    stirred,
    tokens,
)
from hypothesis import given, settings, strategies as st

from transpoint.distill.train.calibration import calibrate
from transpoint.students import HybridCache, HybridForCausalLM, StudentConfig, build_student
from transpoint.students.modeling import window
from transpoint.teachers import attention_view
from transpoint.teachers.random import random_teacher

pytestmark = pytest.mark.stack
ALL_PARTS = {"conv_kernel": 4, "conv_activation": "silu"}
MIXERS = ("window_mamba2", "window_gdn")
STUDENTS = {
    "llama": ("llama", {"feature_map": None}),
    "all parts": ("qwen2", ALL_PARTS),
    "kept attention, no sinks": ("qwen3", {"keep_attention": [1], "sinks": 0}),
    "the teacher's window is shorter": ("mistral", {"window": 12}),
    "no rope, no norms, no gate": ("qwen3", {"rope": False, "qk_norm": False, "norm": False, "gate": False}),
    "a window of one": ("llama", {"window": 1, "sinks": 3}),
    "delta rule": ("llama", {"mixer": "window_gdn"}),
    "delta rule, all parts": ("qwen3", {"mixer": "window_gdn", "rope": True, "feature_map": "softmax", **ALL_PARTS}),
}
students = pytest.mark.parametrize("case", STUDENTS)


def shut(mixer):
    """Keeps tokens from being written to its state."""
    getattr(mixer, "b_bias", mixer.dt_bias).data.fill_(-1e4)


def build(family, mixer="window_mamba2", window=5, sinks=2, keep_attention=(), seed=0, **options):
    """In float64, where a difference is a mistake and not rounding; what as transferred does nothing is stirred."""
    teacher, _ = random_teacher(f"random-{family}", seed)
    config = StudentConfig(mixer, list(keep_attention), window=window, sinks=sinks, **options)
    student = build_student(teacher, config)
    return stirred(student).double()


@functools.cache
def of(case):
    family, options = STUDENTS[case]
    return build(family, **options)


# What it computes


@pytest.mark.parametrize("feature_map", [None, "softmax"])
@pytest.mark.parametrize("name", MIXERS)
def test_it_is_the_sum_of_attention_over_window_and_sinks_and_of_a_recurrence(name, feature_map):
    """Written down token by token."""
    delta = name == "window_gdn"
    student = build(
        "llama", name, window=5, sinks=2, feature_map=feature_map, rope=True, **({} if delta else {"norm": False})
    )
    mixer = student.mixer_layers()[1]
    hidden = torch.randn(1, LENGTH, student.config.hidden_size, dtype=torch.float64)
    cos, sin = student.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    with torch.no_grad():
        found = mixer(hidden, (cos, sin))[0]
        H, P, groups = mixer.num_heads, mixer.head_dim, mixer.num_heads // mixer.num_kv_heads

        def heads(projection, rotated):
            t = projection(hidden)[0].view(LENGTH, -1, P)
            if rotated:
                a, b = t.chunk(2, -1)
                t = t * cos[0, :, None] + torch.cat((-b, a), -1) * sin[0, :, None]
            return t if t.shape[1] == H else t.repeat_interleave(groups, 1)

        q, k, v = heads(mixer.q_proj, True), heads(mixer.k_proj, True), heads(mixer.v_proj, False)
        dt = torch.nn.functional.softplus(mixer.dt_proj(hidden)[0] + mixer.dt_bias)
        share = 2 * torch.sigmoid(mixer.mix_proj(hidden)[0] + mixer.mix_bias)
        z = torch.nn.functional.silu(mixer.z_proj(hidden)[0]).view(LENGTH, H, P)
        if delta:
            beta = torch.sigmoid(mixer.b_proj(hidden)[0] + mixer.b_bias)
            norm = mixer.norm.weight.view(H, P)
        rows = []
        for head in range(H):
            if feature_map:
                C, B = (
                    torch.cat((x + x @ by, -x - x @ by), -1).softmax(-1)
                    for x, by in (
                        (q[:, head] / P**0.25, mixer.q_map[head]),
                        (k[:, head] / P**0.25, mixer.k_map[head // groups]),
                    )
                )
            else:
                C, B = q[:, head] / P**0.5, k[:, head]
            if delta:
                C, B = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (C, B))
            state = torch.zeros(P, B.shape[1], dtype=torch.float64)
            for t in range(LENGTH):
                seen = [s for s in range(t + 1) if s > t - 5 or s < 2]
                weights = (k[seen, head] @ q[t, head] / P**0.5).softmax(0)
                decay = torch.exp(dt[t, head] * -torch.exp(mixer.A_log[head]))
                if delta:
                    state = decay * state
                    state = state + beta[t, head] * torch.outer(v[t, head] - state @ B[t], B[t])
                    gated = state @ C[t] * z[t, head]
                    gated = gated / (gated.square().mean() + mixer.norm_eps).sqrt() * norm[head]
                else:
                    state = decay * state + dt[t, head] * torch.outer(v[t, head], B[t])
                    gated = (state @ C[t] + mixer.D[head] * v[t, head]) * z[t, head]
                rows.append(share[t, head] * weights @ v[seen, head] + gated)
        y = torch.stack(rows).view(H, LENGTH, P).transpose(0, 1).reshape(1, LENGTH, H * P)
        assert_near(found, mixer.o_proj(y), 1e-7)  # decay is in float32


@pytest.mark.parametrize(
    ("family", "mixer"),
    [(family, MIXERS[0]) for family in ("llama", "qwen2", "qwen3", "mistral")] + [("qwen3", MIXERS[1])],
)
@pytest.mark.parametrize("reach", [{"window": 64, "sinks": 0}, {"window": 1, "sinks": 64}], ids=["window", "sinks"])
def test_a_window_over_all_beside_a_state_that_is_not_written_is_the_teacher(family, mixer, reach):
    teacher, _ = random_teacher(f"random-{family}", 0)
    if family == "mistral" and reach["window"] == 1:
        reach = {"window": 64, "sinks": 0}  # sinks reach past the teacher's own window
    student = build_student(teacher, StudentConfig(mixer, [], **reach))
    with torch.no_grad():
        for layer in student.mixer_layers():
            shut(layer)
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


@students
def test_packed_documents_are_computed_as_each_alone(case):
    student, ids = of(case), tokens(1, 30)
    positions = torch.cat([torch.arange(n) for n in (11, 3, 16)])[None]
    found = logits(student, ids, position_ids=positions)
    alone = [logits(student, part) for part in ids.split([11, 3, 16], 1)]
    assert_near(found, torch.cat(alone, 1))


@pytest.mark.parametrize("padding", [7, 13, 20, 38])  # from 12 on the second block ends before the row begins
def test_many_queries_attend_block_by_block(monkeypatch, padding):
    student, ids = build("llama"), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    positions = torch.cat([torch.arange(n) for n in (11, 3, 26)])[None]
    plain, padded = logits(student, ids), logits(student, ids, attention_mask=mask)
    packed = logits(student, ids, position_ids=positions)
    monkeypatch.setattr(window, "BLOCK", 6)
    assert_near(logits(student, ids), plain)
    assert_near(logits(student, ids, attention_mask=mask)[mask == 1], padded[mask == 1])
    assert_near(logits(student, ids, position_ids=positions), packed)


@pytest.mark.parametrize("name", MIXERS)
def test_what_lies_between_sinks_and_window_reaches_a_token_through_the_state_alone(name):
    student, ids = build("llama", name, window=3, sinks=1), tokens(1)
    other = ids.clone()
    other[0, 4] = (other[0, 4] + 1) % 250
    mixer = student.mixer_layers()[0]
    embedded = [student.model.embed_tokens(one) for one in (ids, other)]
    rotary = student.model.rotary_emb(embedded[0], torch.arange(LENGTH)[None])
    with torch.no_grad():
        first, second = (mixer(one, rotary)[0][0, -1] for one in embedded)
        assert (first - second).norm() > 1e-6 * first.norm()
        shut(mixer)
        first, second = (mixer(one, rotary)[0][0, -1] for one in embedded)
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


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


def test_a_cache_holds_window_and_sinks_and_no_more_and_goes_through_a_file(tmp_path):
    student, ids = build("llama", window=5, sinks=2), tokens(2, 30)
    cache = student.new_cache()
    in_pieces(student, ids[:, :20], [12, 1, 7], cache=cache)
    for layer in cache.layers:
        assert layer.keys.shape[1] == layer.values.shape[1] == layer.position.shape[1] == 7
        assert layer.position[0].tolist() == [0, 1, 17, 18, 19, 15, 16]
    cache.save(tmp_path / "cache.safetensors")
    read = HybridCache.load(tmp_path / "cache.safetensors", student.config, dtype=torch.float64)
    fork = cache.fork(2)
    expected = logits(student, ids)[:, 20:]
    with torch.no_grad():
        assert_near(student(ids[:, 20:], cache=read).logits, expected)
        assert_near(student(ids[:, 20:].repeat_interleave(2, 0), cache=fork).logits[::2], expected)


def test_generation_with_a_cache_equals_generation_without():
    student, ids = build("qwen3"), tokens(2, 6)
    found = [student.generate(ids, max_new_tokens=14, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*found)
    beams = student.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False)
    assert beams.shape[0] == 2


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_go_through_steps_with_a_cache(name):
    """To what the window holds; kernels of a step have none."""
    student, ids = build("llama", name), tokens(1, 12)
    cache, layer = student.new_cache(), student.model.layers[0].self_attn
    student(ids[:, :9], cache=cache)
    for t in range(9, 12):
        loss = student(ids[:, t : t + 1], cache=cache).logits.square().mean()
    loss.backward()
    assert layer.k_proj.weight.grad.abs().sum() > 0
    student.zero_grad()


def test_padding_after_the_tokens_of_a_first_piece_is_padding():
    student, ids = build("llama", "window_gdn", window=3), tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[0, 5:9] = 0
    positions, cache = mask.cumsum(1) - 1, student.new_cache()
    with torch.no_grad():
        student(ids[:, :9], cache=cache, attention_mask=mask[:, :9], position_ids=positions[:, :9])
        found = student(ids[:, 9:], cache=cache, attention_mask=mask, position_ids=positions[:, 9:]).logits[0]
    assert_near(found, logits(student, torch.cat((ids[:1, :5], ids[:1, 9:]), 1))[0, 5:])


# Stages


@pytest.mark.parametrize("name", MIXERS)
def test_calibration_fits_the_state_to_what_the_window_leaves(name):
    teacher, _ = random_teacher("random-llama", 0)
    student = build_student(teacher, StudentConfig(name, [], window=4, sinks=0))
    ids = tokens(2, 64)
    batches = [{"input_ids": ids, "position_ids": torch.arange(64).expand(2, -1)}]

    def error():
        total = 0.0
        for view, mixer in zip(attention_view(teacher), student.mixer_layers(), strict=True):
            seen = {}
            module = teacher.get_decoder().layers[view.layer].self_attn
            handle = module.register_forward_hook(
                lambda module, args, kwargs, output, seen=seen: seen.update(kwargs, output=output[0]), with_kwargs=True
            )
            logits(teacher, ids)
            handle.remove()
            found = mixer(seen["hidden_states"], seen["position_embeddings"])[0]
            total += float((found - seen["output"]).pow(2).sum() / seen["output"].pow(2).sum())
        return total / 4

    with torch.no_grad():
        for mixer in student.mixer_layers():
            shut(mixer)
        window_alone = error()
        found = calibrate(teacher, student, batches)
        with_state = error()
    assert with_state < window_alone
    assert all(0 < fit.error < 1 for fit in found.values())


def test_in_training_sequences_go_without_their_window_at_random():
    student = build("llama", window_drop=0.5)
    mixer = student.mixer_layers()[0].train()
    hidden = torch.randn(1, LENGTH, student.config.hidden_size, dtype=torch.float64).expand(16, -1, -1)
    rotary = student.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    torch.manual_seed(0)
    with torch.no_grad():
        rows = mixer(hidden, rotary)[0]
        whole = mixer.eval()(hidden, rotary)[0][0]
        mixer.train().window_drop = 1.0
        alone = mixer(hidden, rotary)[0][0]
    with_window = [torch.allclose(row, whole, atol=1e-12) for row in rows]
    without = [torch.allclose(row, alone, atol=1e-12) for row in rows]
    assert 0 < sum(with_window) < 16 and sum(with_window) + sum(without) == 16


def test_a_saved_student_is_read_again(tmp_path):
    student, ids = build("qwen2", keep_attention=[0], **ALL_PARTS), tokens()
    student.save_pretrained(tmp_path)
    read = HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_near(logits(read, ids), logits(student, ids))
