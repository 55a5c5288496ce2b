"""The TransMamba mixer on whole sequences: the teacher's attention, an independent recurrence, and what is between."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from decoding import stirred
from hypothesis import given, settings, strategies as st

from transpoint.kernels.ssd import ssd_scan
from transpoint.students import (
    StudentConfig,
    build_student,
    memory_converter,
    plan_student,
)
from transpoint.students.modeling.documents import Documents
from transpoint.teachers import load_teacher
from transpoint.teachers.random import random_teacher

INF = math.inf
LENGTH = 40  # longer than the window of the tiny Mistral and than a chunk of the scan

TEACHERS = {
    "llama": ("llama", {}),
    "6 heads over 2": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "4 heads over 1": ("llama", {"num_key_value_heads": 1}),
    "4 heads over 4": ("llama", {"num_key_value_heads": 4}),
    "biases, o too": ("llama", {"attention_bias": True}),
    "head_dim 24 of hidden 64": ("llama", {"head_dim": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2, every second layer with a window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3, 6 heads over 3": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}),
    "mistral": ("mistral", {}),
}
teachers = pytest.mark.parametrize("case", TEACHERS)
ALL_PARTS = {"conv_kernel": 4, "conv_activation": "silu", "gate": True, "norm": True}
OPTIONS = {
    "default": {},
    "all parts": ALL_PARTS,
    "no rope": {"rope": False},
    "convolution": {"conv_kernel": 3},
    "no q/k norms": {"qk_norm": False, "gate": True},
}


def teacher_of(case):
    family, fields = TEACHERS[case]
    return random_teacher(f"random-{family}", 3, **fields)[0]


def build(case, points, double=True, **options):
    """In float64, where a difference is a mistake and not rounding."""
    options = {"keep_attention": [], **options}
    config = StudentConfig(mixer="transmamba", trans_points=points, **options)
    student = stirred(build_student(teacher_of(case), config))
    return student.double() if double else student


def tokens(batch=2, length=LENGTH, seed=0):
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def assert_near(found, expected, tolerance=1e-9):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


# The teacher at infinity


@teachers
@pytest.mark.parametrize("options", [{}, ALL_PARTS, {"rope": False}], ids=["default", "all parts", "no rope"])
def test_at_infinity_a_student_is_its_teacher(case, options):
    """Whatever the state-space form has, in float32."""
    student, teacher = build(case, "inf", double=False, **options), teacher_of(case)
    ids = tokens()
    expected = logits(teacher, ids)
    torch.testing.assert_close(logits(student, ids), expected, rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    found, expected = (logits(model, ids, attention_mask=mask)[mask == 1] for model in (student, teacher))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    positions = torch.cat((torch.arange(9), torch.arange(LENGTH - 9)))[None]
    found, expected = (logits(model, ids, position_ids=positions) for model in (student, teacher))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@teachers
def test_up_to_its_trans_point_a_student_is_its_teacher(case):
    ids, teacher, student = tokens(), teacher_of(case).double(), build(case, 25)
    expected, found = logits(teacher, ids), logits(student, ids)
    assert_near(found[:, :25], expected[:, :25])
    assert (found[:, 25:] - expected[:, 25:]).norm() / expected.norm() > 1e-2


def test_at_infinity_every_gradient_of_the_teachers_parameters_is_the_teachers():
    ids, teacher, student = tokens(), teacher_of("qwen3").double(), build("qwen3", "inf")
    for model in (teacher, student):
        model(ids, labels=ids, use_cache=False).loss.backward()
    found = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-7, atol=1e-12)
    own = student.mixer_layers()[0].state_space_parameters()
    assert set(own) == {"dt_proj.weight", "dt_bias", "A_log", "D"} and all(p.grad is None for p in own.values())


# The state-space form, against a recurrence written down token by token


def rotated(t, base):
    """Rotary embedding of t (B,L,heads,P) as defined: dimensions i and i + P/2 turn by position * base^(-2i/P)."""
    length, size = t.shape[1], t.shape[-1]
    angle = torch.arange(length).double()[:, None] * base ** (-torch.arange(0, size, 2).double() / size)
    turned = torch.complex(*t.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def recurrence(mixer, hidden, base, options):
    """What a mixer computes with trans_point 0, token by token and head by head, from its parameters alone."""
    P, H, K = mixer.head_dim, mixer.num_heads, mixer.num_kv_heads
    parts = [F.linear(hidden, p.weight, p.bias) for p in (mixer.v_proj, mixer.k_proj, mixer.q_proj)]
    if options.get("conv_kernel"):
        taps = mixer.conv1d.weight.shape[-1]
        padded = F.pad(torch.cat(parts, -1), (0, 0, taps - 1, 0)).transpose(1, 2)
        mixed = F.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=padded.shape[1]).transpose(1, 2)
        mixed = F.silu(mixed) if options.get("conv_activation") else mixed
        parts = mixed.split([part.shape[-1] for part in parts], -1)
    v, k, q = (part.unflatten(-1, (-1, P)) for part in parts)
    if hasattr(mixer.q_norm, "weight") and options.get("qk_norm", True):
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    if options.get("rope", True):
        q, k = rotated(q, base), rotated(k, base)
    dt = F.softplus(F.linear(hidden, mixer.dt_proj.weight) + mixer.dt_bias)
    read = torch.zeros(*hidden.shape[:2], H, P, dtype=hidden.dtype)
    for h in range(H):
        g = h // (H // K)
        state = torch.zeros(len(hidden), P, P, dtype=hidden.dtype)
        for t in range(hidden.shape[1]):
            decay = torch.exp(-torch.exp(mixer.A_log[h]) * dt[:, t, h])[:, None, None]
            state = decay * state + dt[:, t, h, None, None] * v[:, t, g, :, None] * k[:, t, g, None, :]
            read[:, t, h] = torch.einsum("bpn,bn->bp", state, q[:, t, h] * P**-0.5) + mixer.D[h] * v[:, t, g]
    if options.get("gate"):
        gate = F.silu(F.linear(hidden, mixer.z_proj.weight, mixer.z_proj.bias)).unflatten(-1, (H, P))
        read = read * gate
    if options.get("norm"):
        read = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + mixer.norm_eps)
        read = read * mixer.norm.weight.unflatten(0, (H, P))
    return F.linear(read.flatten(2), mixer.o_proj.weight, mixer.o_proj.bias)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("case", ["6 heads over 2", "biases, o too", "qwen3, 6 heads over 3", "mistral"])
def test_at_zero_a_mixer_is_the_recurrence(case, options):
    student = build(case, 0, **options)
    mixer, hidden = student.mixer_layers()[2], tokens(2, 23 * student.config.hidden_size).double() / 125 - 1
    hidden = hidden.unflatten(1, (23, -1))
    rotary = student.model.rotary_emb(hidden, torch.arange(23)[None])
    expected = recurrence(mixer, hidden, student.config.rope_parameters["rope_theta"], options)
    assert_near(mixer(hidden, rotary)[0], expected, 1e-6)  # rotary tables are float32
    for parameter in mixer.state_space_parameters().values():  # none of which the comparison could miss
        before = parameter.clone()
        parameter.mul_(1.05)
        assert (mixer(hidden, rotary)[0] - expected).norm() / expected.norm() > 1e-5
        parameter.copy_(before)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("case", ["6 heads over 2", "qwen3", "mistral"])
def test_past_its_trans_point_a_mixer_does_not_depend_on_it(case, options):
    student = build(case, 0, **options)
    mixer, hidden = student.mixer_layers()[1], torch.randn(2, LENGTH, student.config.hidden_size).double()
    rotary = student.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    expected = mixer(hidden, rotary)[0]
    mixer.trans_point = INF
    attention = mixer(hidden, rotary)[0]
    assert (attention - expected)[:, 1:].norm(dim=-1).min() > 1e-3
    for point in range(LENGTH + 2):
        mixer.trans_point = point
        found = mixer(hidden, rotary)[0]
        assert_near(found[:, :point], attention[:, :point])
        assert_near(found[:, point:], expected[:, point:])


# The memory converter


def converter_inputs(batch, length, heads, x_heads, b_heads, P, N, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A = -torch.rand(heads, generator=generator, dtype=torch.float64) - 0.05
    inputs = (normal(batch, length, x_heads, P), normal(batch, length, heads), A, normal(batch, length, b_heads, N))
    return [t.requires_grad_() for t in (*inputs, normal(heads))]


def pure_state(x, dt, A, B, dt_bias):
    """The state of S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T after all tokens, one token after the other."""
    dt, heads = F.softplus(dt + dt_bias), dt.shape[-1]
    x, B = (t.repeat_interleave(heads // t.shape[2], 2) for t in (x, B))
    state = torch.zeros(len(x), heads, x.shape[-1], B.shape[-1], dtype=x.dtype)
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        state = torch.exp(step * A[:, None, None]) * state + step * x[:, t, :, :, None] * B[:, t, :, None, :]
    return state


@settings(max_examples=12)
@given(
    length=st.integers(1, 70),
    heads=st.sampled_from([(4, 2, 2), (6, 3, 1), (2, 2, 2), (4, 1, 4)]),
    sizes=st.sampled_from([(3, 5), (8, 8), (1, 4)]),
    seed=st.integers(0, 99),
)
def test_the_converters_state_is_that_of_the_scan_with_all_gradients(length, heads, sizes, seed):
    inputs = converter_inputs(2, length, *heads, *sizes, seed)
    x, dt, A, B, dt_bias = inputs
    found, expected = memory_converter(x, dt, A, B, dt_bias=dt_bias), pure_state(x, dt, A, B, dt_bias)
    assert_near(found, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = [torch.autograd.grad((weight * state).sum(), inputs) for state in (found, expected)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@settings(max_examples=12)
@given(length=st.integers(2, 60), data=st.data(), seed=st.integers(0, 99))
def test_a_scan_goes_on_from_the_converters_state(length, data, seed):
    """Outputs and every gradient are those of one scan over all tokens."""
    point = data.draw(st.integers(1, length - 1))
    inputs = converter_inputs(2, length, 4, 2, 2, 4, 6, seed)
    x, dt, A, B, dt_bias = inputs
    C = torch.randn(2, length, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    options = {"dt_bias": dt_bias}
    state = memory_converter(x[:, :point], dt[:, :point], A, B[:, :point], **options)
    rest = [t[:, point:] for t in (x, dt, B, C)]
    found = ssd_scan(rest[0], rest[1], A, rest[2], rest[3], **options, initial_state=state)
    expected = ssd_scan(x, dt, A, B, C, **options)[:, point:]
    assert_near(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_the_converter_takes_at_least_one_token():
    x, dt, A, B, _ = converter_inputs(1, 1, 2, 2, 2, 3, 3, 0)
    with pytest.raises(ValueError, match="L = 0"):
        memory_converter(x[:, :0], dt[:, :0], A, B[:, :0])


# Packed documents and padding


STUDENTS = {
    "llama": ("llama", {}),
    "kept attention": ("qwen3", {"keep_attention": [1]}),
    "all parts": ("biases, o too", ALL_PARTS),
    "window": ("mistral", {}),
}


@pytest.fixture(scope="module", params=STUDENTS.values(), ids=STUDENTS.keys())
def student(request):
    case, options = request.param
    return build(case, "inf", **options)


def positions_of(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


points_of_layers = st.lists(st.one_of(st.integers(0, 30), st.just("inf")), min_size=4, max_size=4)


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5), points=points_of_layers, shortest=st.integers(1, 16)
)
def test_packed_documents_equal_separate_ones(student, lengths, points, shortest):
    student.set_trans_points(points, warn=False)
    ids = tokens(1, sum(lengths))
    with mock.patch(
        "transpoint.students.modeling.documents.SHORTEST", shortest
    ):  # so that there are several groups of rows
        packed = logits(student, ids, position_ids=positions_of(lengths)).split(lengths, 1)
    for found, document in zip(packed, ids.split(lengths, 1), strict=True):
        assert_near(found, logits(student, document))


@pytest.mark.slow
@settings(max_examples=8)
@given(cuts=st.lists(st.integers(1, 39), min_size=3, max_size=3), points=points_of_layers)
def test_rows_of_a_batch_have_boundaries_of_their_own(student, cuts, points):
    student.set_trans_points(points, warn=False)
    ids = tokens(3, 40)
    packed = logits(student, ids, position_ids=torch.cat([positions_of([cut, 40 - cut]) for cut in cuts]))
    for row, cut in enumerate(cuts):
        assert_near(packed[row, :cut], logits(student, ids[row : row + 1, :cut])[0])
        assert_near(packed[row, cut:], logits(student, ids[row : row + 1, cut:])[0])


@pytest.mark.slow
@mock.patch("transpoint.students.modeling.documents.SHORTEST", 2)
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 24), min_size=2, max_size=4), points=points_of_layers)
def test_gradients_of_packed_documents_are_those_of_separate_ones(student, lengths, points):
    student.set_trans_points(points, warn=False)
    ids = tokens(1, sum(lengths))
    weight = torch.randn(sum(lengths), student.config.vocab_size, generator=torch.Generator().manual_seed(1)).double()
    parameters = dict(student.named_parameters())

    def gradients(loss):
        return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    packed = gradients((student(ids, position_ids=positions_of(lengths), use_cache=False).logits[0] * weight).sum())
    apart = gradients(
        sum(
            (student(document, use_cache=False).logits[0] * part).sum()
            for document, part in zip(ids.split(lengths, 1), weight.split(lengths), strict=True)
        )
    )
    for name, found, expected in zip(parameters, packed, apart, strict=True):
        if found is None or expected is None:  # a form that no document is long enough for
            assert all(g is None or not g.any() for g in (found, expected)), name
        else:
            assert (found - expected).norm() <= 1e-6 * expected.norm() + 1e-9, name  # A_log goes through float32


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=12), length=st.integers(1, 300), rows=st.integers(1, 3)
)
def test_prefixes_of_documents_take_few_places(lengths, length, rows):
    """Of a batch whose rows hold the same documents: every token of a prefix has a place, and few places are empty."""
    documents = Documents(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(rows, -1))
    groups, out, back = documents.prefixes(length)
    held = [min(n, length) for n in lengths] * rows
    assert len(out) == sum(count * width for count, width in groups) <= sum(max(16, 2 * n) for n in held)
    assert sum(count for count, _ in groups) == len(held) and max(width for _, width in groups) <= length
    kept = documents.position.flatten() < length
    assert torch.equal(back >= 0, kept) and torch.equal(out[back[kept]], torch.arange(len(back))[kept])
    assert ((out >= 0).sum() == kept.sum()) and torch.equal(
        out[-1 - back[~kept]], last_places(documents, length)[~kept]
    )


def last_places(documents, length):
    """For each token the last one of its document's prefix."""
    position = documents.position.flatten()
    return torch.arange(len(position)) - position + length - 1


def test_a_mixer_alone_finds_its_documents_itself():
    student = build("llama", 5)
    mixer, hidden = student.mixer_layers()[0], torch.randn(2, 20, 64).double()
    seq_idx = torch.tensor([[0] * 8 + [1] * 12])
    rotary = student.model.rotary_emb(hidden, positions_of([8, 12]))
    found = mixer(hidden, rotary, seq_idx=seq_idx)[0]
    assert torch.equal(found, mixer(hidden, rotary, seq_idx=seq_idx, documents=Documents(seq_idx.expand(2, -1)))[0])
    assert_near(found[:, 8:], mixer(hidden[:, 8:], [table[:, 8:] for table in rotary])[0])


def test_packed_documents_take_no_cache_and_no_padding():
    student = build("llama", 5)
    mixer, hidden = student.mixer_layers()[0], torch.randn(1, 4, 64).double()
    rotary, seq_idx = student.model.rotary_emb(hidden, torch.arange(4)[None]), torch.tensor([[0, 0, 1, 1]])
    for more in ({"cache": student.new_cache()}, {"padding_mask": torch.ones(1, 4)}):
        with pytest.raises(ValueError, match="packed documents take neither a cache nor padding"):
            mixer(hidden, rotary, seq_idx=seq_idx, **more)
    with pytest.raises(ValueError, match="documents and span are those of seq_idx: give it, too"):
        mixer(hidden, rotary, documents=Documents(seq_idx))


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    points=points_of_layers,
    more=st.integers(0, 3),
)
def test_real_tokens_of_a_padded_batch_have_the_logits_of_unpadded_rows(student, lengths, side, points, more):
    student.set_trans_points(points, warn=False)
    width = max(lengths) + more
    ids, mask = torch.full((len(lengths), width), 7), torch.zeros(len(lengths), width, dtype=torch.long)
    rows = [tokens(1, length, seed=length)[0] for length in lengths]
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    # Positions as generate() gives them: then rotary tables, which are float32, are the same too.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(student, ids, attention_mask=mask, position_ids=positions)
    assert found.isfinite().all()
    for i, row in enumerate(rows):
        assert_near(found[i][mask[i] == 1], logits(student, row[None])[0])


# Training


def loss_and_gradients(student, **kwargs):
    student.train()
    student.zero_grad()
    ids = tokens(2, 20)
    loss = student(ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in student.named_parameters()}


GIVEN = {
    "nothing": {},
    "mask": {"attention_mask": torch.tensor([[0] * 6 + [1] * 14, [1] * 20])},
    "documents": {"position_ids": positions_of([8, 12])},
}


@pytest.mark.parametrize("given_", GIVEN.values(), ids=GIVEN.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradients_reach_every_parameter(options, given_):
    student = build("qwen3", 5, **options)
    loss, gradients = loss_and_gradients(student, **given_)
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.isfinite().all() and gradient.norm() > 0, name


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("given_", GIVEN.values(), ids=GIVEN.keys())
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(given_):
    student = build("qwen3", 5)
    loss, gradients = loss_and_gradients(student, **given_)
    student.gradient_checkpointing_enable()
    again, gradients_again = loss_and_gradients(student, **given_)
    assert again == pytest.approx(loss, rel=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-7, atol=1e-12)


def test_attention_costs_the_prefix_not_the_sequence(monkeypatch):
    shapes, student = [], build("llama", [0, 7, 39, "inf"])
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *args, **kw: (shapes.append(q.shape[2]), attend(q, *args, **kw))[1]
    )
    logits(student, tokens())
    assert shapes == [7, 39, 40]


# Transfer


@teachers
@pytest.mark.parametrize("options", [{}, ALL_PARTS], ids=["default", "all parts"])
def test_a_student_has_the_teachers_tensors_under_their_names_and_a_few_more(case, options):
    teacher = teacher_of(case)
    config = StudentConfig(mixer="transmamba", **options)
    student = build_student(teacher, config)
    own = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        assert torch.equal(own.pop(name), parameter) and parameter is not own.get(name)
    kinds = {name.split("self_attn.")[1] for name in own}
    more = {"conv1d.weight", "conv1d.bias", "z_proj.weight", "z_proj.bias", "norm.weight"} if options else set()
    assert kinds == {"dt_proj.weight", "dt_bias", "A_log", "D"} | more
    mixer = student.mixer_layers()[0]
    assert set(mixer.state_space_parameters()) == kinds and mixer.out is mixer.o_proj
    decay = torch.exp(-torch.exp(mixer.A_log) * F.softplus(mixer.dt_bias))
    torch.testing.assert_close(decay**32, torch.full_like(decay, 0.5))
    torch.testing.assert_close(F.softplus(mixer.dt_bias), torch.ones_like(decay))
    assert not mixer.D.any() and not mixer.dt_proj.weight.any()
    if options:
        assert not mixer.conv1d.weight[..., :-1].any() and not mixer.conv1d.bias.any()
        assert set(mixer.conv1d.weight[:, 0, -1].unique().tolist()) == {0.25, 1.0}
        assert not mixer.z_proj.weight.any() and torch.equal(mixer.norm.weight, torch.ones_like(mixer.norm.weight))
        torch.testing.assert_close(F.silu(mixer.z_proj.bias), torch.ones_like(mixer.z_proj.bias))


def test_the_plan_says_that_projections_are_copies():
    plan = plan_student(teacher_of("qwen2"), StudentConfig(mixer="transmamba"))[1]
    copies = {t.target: t.source for t in plan.transfers if t.operation == "copy"}
    assert all(target == source for target, source in copies.items())
    first = {target.split("self_attn.")[1] for target in copies if "layers.0." in target}
    assert first == {f"{n}_proj.weight" for n in "qkvo"} | {f"{n}_proj.bias" for n in "qkv"}
    assert {t.operation for t in plan.transfers} == {"copy", "constant"}


def test_a_student_of_mamba2_layers_says_so_of_its_parameters(make_student):
    mixer = make_student().mixer_layers()[0]
    assert (
        mixer.out is mixer.out_proj and mixer.state_space_parameters().keys() == dict(mixer.named_parameters()).keys()
    )


def test_windows_stay_with_attention():
    student, _ = plan_student(teacher_of("mistral"), StudentConfig(mixer="transmamba"))
    assert student.windows_given_up == [] and [mixer.window for mixer in student.mixer_layers()] == [16] * 4
    student, _ = plan_student(
        teacher_of("qwen2, every second layer with a window"), StudentConfig(mixer="transmamba", keep_attention=[0])
    )
    assert [mixer and mixer.window for mixer in student.mixer_layers()] == [None, 5, None, 5]


def test_half_precision_keeps_decay_step_and_skip_in_float32():
    teacher = teacher_of("qwen3").to(torch.bfloat16)
    student = build_student(teacher, StudentConfig(mixer="transmamba", trans_points=9, **ALL_PARTS))
    for name, parameter in student.named_parameters():
        exact = name.split(".")[-1] in ("A_log", "dt_bias", "D")
        assert parameter.dtype == (torch.float32 if exact else torch.bfloat16), name
    found = logits(student, tokens())
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert_near(found[:, :9].float(), logits(teacher, tokens())[:, :9].float(), 1e-2)


@pytest.mark.slow
def test_smollm2_answers_as_a_student_at_infinity_as_it_does_itself():
    teacher, tokenizer = load_teacher("smollm2-135m")
    student = build_student(teacher, StudentConfig(mixer="transmamba", trans_points="inf"))
    questions = ["What is the capital of France?", "Why?"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
    )
    own, found = (model.generate(**inputs, max_new_tokens=7, do_sample=False) for model in (teacher, student))
    assert torch.equal(found, own) and "Paris" in tokenizer.decode(found[0])
