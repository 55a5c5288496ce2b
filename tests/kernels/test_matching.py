"""mixing_distance (the PyTorch reference) against materialised matrices in float64."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from transpoint.kernels import matching, matching_reference
from transpoint.kernels.matching import mixing_distance
from transpoint.kernels.ssd import ssd_matrix

# (H, K of the keys, Hb, Hc)
GROUPINGS = [(6, 2, 2, 6), (4, 1, 4, 1), (4, 4, 1, 1), (4, 2, 4, 2), (6, 3, 3, 2)]
TRAINED = ("dt", "A", "B", "C", "dt_bias")


def make(length, grouping=(4, 2, 2, 4), batch=2, P=4, N=3, dtype=torch.float64, seed=0):
    """Random arguments of mixing_distance as a dict; the student's require grad."""
    heads, hk, hb, hc = grouping
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    args = dict(
        q=normal(batch, length, heads, P),
        k=normal(batch, length, hk, P),
        dt=normal(batch, length, heads),
        A=(-0.02 - torch.rand(heads, generator=g, dtype=torch.float64)).to(dtype),
        B=normal(batch, length, hb, N),
        C=normal(batch, length, hc, N) / N**0.5,
        dt_bias=normal(heads),
    )
    return {name: t.requires_grad_(name in TRAINED) for name, t in args.items()}


def materialised(
    q, k, dt, A, B, C, scale=None, dt_bias=None, dt_softplus=True, seq_idx=None, window=None, softcap=None, mask=None
):
    """Distance and norm from whole matrices."""
    batch, length, heads, width = q.shape
    scores = torch.einsum("bthp,bshp->bhts", q, k.repeat_interleave(heads // k.shape[2], 2))
    scores = scores * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    t = torch.arange(length)
    seen = (t[:, None] >= t).expand(batch, 1, length, length)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.log1p(torch.exp(dt)) if dt_softplus else dt
    if seq_idx is not None:
        changes = [[a != b for a, b in zip(row, row[1:], strict=False)] for row in seq_idx.tolist()]
        document = torch.tensor([[sum(row[:i]) for i in range(length)] for row in changes])
        seen = seen & (document[:, None, :, None] == document[:, None, None, :])
    if mask is not None:
        mask = mask.bool()
        dt = dt * mask[..., None]
        seen = seen & mask[:, None, :, None] & mask[:, None, None, :]
    visible = seen if window is None else seen & (t[:, None] - t < window)
    P = torch.where(visible, scores.exp(), 0)
    P = P / P.sum(-1, keepdim=True).clamp(min=1e-300)
    M = torch.where(seen, ssd_matrix(dt, A, B, C, dt_softplus=False), 0)
    return (P - M).square().sum((-1, -2)), P.square().sum((-1, -2))


def run_with_gradients(function, args, **options):
    """Distance, norm and the gradients of a fixed random combination of the distances."""
    distance, norm = function(**args, **options)
    assert distance.shape == norm.shape == (args["dt"].shape[0], args["dt"].shape[2])
    weights = torch.randn(distance.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = [name for name in TRAINED if name in args]
    grads = torch.autograd.grad((distance.double() * weights).sum(), [args[name] for name in names])
    return {"distance": distance, "norm": norm, **{f"d{name}": g for name, g in zip(names, grads, strict=True)}}


def reference(**kwargs):
    return mixing_distance(**kwargs, return_norm=True)


def double(args):
    return {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in args.items()}


def assert_same(got, want, rtol=1e-9, atol=1e-9):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].isfinite().all(), name
        torch.testing.assert_close(
            got[name].double(), want[name].double(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(matching_reference, "BLOCK_ROWS", 4)


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_values_and_gradients_for_every_head_grouping(grouping, few_rows):
    args = make(11, grouping)
    assert_same(run_with_gradients(reference, args), run_with_gradients(materialised, args))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_for_odd_lengths(length, dtype):
    args = make(length, (2, 1, 1, 2), batch=1, dtype=dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    want = run_with_gradients(materialised, double(args))
    assert_same(run_with_gradients(reference, args), want, rtol=tolerance, atol=tolerance)


@given(data=st.data())
def test_any_shape_and_options(data):
    length, options = data.draw(st.integers(1, 20)), {}
    args = make(length, data.draw(st.sampled_from(GROUPINGS)), seed=data.draw(st.integers(0, 9)))
    if data.draw(st.booleans()):
        del args["dt_bias"]
    if data.draw(st.booleans()):
        row = st.lists(st.integers(0, 2), min_size=length, max_size=length)
        options["seq_idx"] = torch.tensor([sorted(data.draw(row)) for _ in range(2)])
    if data.draw(st.booleans()):
        row = st.lists(st.booleans(), min_size=length, max_size=length)
        options["mask"] = torch.tensor([data.draw(row) for _ in range(2)])
    for name, values in (("window", st.integers(1, 24)), ("softcap", st.floats(0.5, 50)), ("scale", st.floats(0.1, 4))):
        if data.draw(st.booleans()):
            options[name] = data.draw(values)
    if not data.draw(st.booleans()):
        options["dt_softplus"] = False
        with torch.no_grad():  # steps are >= 0
            for name in {"dt", "dt_bias"} & args.keys():
                args[name].abs_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching_reference, "BLOCK_ROWS", data.draw(st.integers(1, 24)))
        got = run_with_gradients(reference, args, **options)
    assert_same(got, run_with_gradients(materialised, args, **options))


def test_first_and_second_derivatives(few_rows):
    args = make(6, (2, 1, 1, 2), batch=1, P=2, N=2)
    tensors = [args[name] for name in TRAINED]

    def function(*values):
        return mixing_distance(args["q"], args["k"], **dict(zip(TRAINED, values, strict=True)), window=3)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_zero_where_the_matrices_are_equal(rate, few_rows):
    """Scores that depend on the key alone make attention a matrix of rank one below the diagonal, as M can be."""
    length = 13
    score = torch.randn(length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.arange(length, dtype=torch.float64)
    q, k = torch.ones(length), score
    B = score.exp() * torch.exp(-rate * t)
    C = torch.exp(rate * t) / score.exp().cumsum(0)
    q, k, B, C = (x.double().view(1, length, 1, 1) for x in (q, k, B, C))
    args = dict(q=q, k=k, dt=torch.ones(1, length, 1).double(), A=torch.tensor([-rate], dtype=torch.float64), B=B, C=C)
    distance, norm = mixing_distance(**args, scale=1.0, dt_softplus=False, return_norm=True)
    assert distance.item() < 1e-25 < norm.item()
    off = mixing_distance(**{**args, "C": 2 * C}, scale=1.0, dt_softplus=False)
    torch.testing.assert_close(off, norm)  # || P - 2 P ||^2


def test_one_token_and_a_window_of_one():
    args = make(1)
    M = ssd_matrix(args["dt"], args["A"], args["B"], args["C"], dt_bias=args["dt_bias"])
    torch.testing.assert_close(mixing_distance(**args), (1 - M).square().sum((-1, -2)))
    args = make(9)
    M = ssd_matrix(args["dt"], args["A"], args["B"], args["C"], dt_bias=args["dt_bias"])
    want = (torch.eye(9) - M).square().sum((-1, -2))
    torch.testing.assert_close(mixing_distance(**args, window=1), want)


def test_options_that_change_nothing():
    args = make(9)
    want = mixing_distance(**args)
    torch.testing.assert_close(mixing_distance(**args, scale=0.5, window=9, softcap=1e6), want)  # P = 4
    everything = torch.ones(2, 9)
    torch.testing.assert_close(mixing_distance(**args, mask=everything, seq_idx=everything.long()), want)


def test_packed_documents_equal_separate_documents(few_rows):
    lengths = [4, 1, 7, 3]
    args = make(sum(lengths), batch=1)
    # A value that comes back later is another document.
    seq_idx = torch.cat([torch.full((1, n), i) for n, i in zip(lengths, [5, 6, 9, 5], strict=True)], 1)
    got = run_with_gradients(reference, args, seq_idx=seq_idx, window=5)
    parts, start = [], 0
    for n in lengths:
        part = {k: v if k in ("A", "dt_bias") else v[:, start : start + n] for k, v in args.items()}
        parts.append(run_with_gradients(reference, {k: v.detach().requires_grad_() for k, v in part.items()}, window=5))
        start += n
    for name in got:
        values = [part[name] for part in parts]
        whole = torch.cat(values, 1) if name in ("ddt", "dB", "dC") else sum(values)
        torch.testing.assert_close(got[name], whole, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_no_padding(side, few_rows):
    args = make(15, batch=1)
    kept = slice(4, None) if side == "left" else slice(None, 11)
    mask = torch.zeros(1, 15, dtype=torch.bool)
    mask[:, kept] = True
    part = {k: v if k in ("A", "dt_bias") else v[:, kept] for k, v in args.items()}
    want = run_with_gradients(reference, {k: v.detach().requires_grad_() for k, v in part.items()})
    for kind in (torch.bool, torch.int64, torch.float32):
        got = run_with_gradients(reference, args, mask=mask.to(kind))
        for name in ("ddt", "dB", "dC"):
            assert (got[name][:, ~mask[0]] == 0).all(), name
            got[name] = got[name][:, kept]
        assert_same(got, want)


def test_all_padding_is_zero():
    args = make(5)
    got = run_with_gradients(reference, args, mask=torch.zeros(2, 5))
    assert all((t == 0).all() for t in got.values())


@pytest.mark.parametrize("case", ["erased at once", "steps of both kinds", "long memory"])
def test_float32_is_accurate_whatever_the_decay(case):
    args = make(300, (2, 1, 1, 2), batch=1, dtype=torch.float32)
    del args["dt_bias"]
    with torch.no_grad():
        args["dt"].fill_(4)
        args["A"].fill_(-16)
        if case == "steps of both kinds":
            args["dt"][:, 1::2] = 1e-3
        if case == "long memory":
            args["A"].fill_(-1e-4)
    got = run_with_gradients(reference, args, dt_softplus=False)
    want = run_with_gradients(materialised, double(args), dt_softplus=False)
    for name in want:
        assert got[name].isfinite().all(), name
        assert (got[name] - want[name]).norm() <= 2e-6 * want[name].norm() + 1e-20, name


class Largest(TorchDispatchMode):
    """The most elements that any tensor made in its context has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_no_whole_matrix_is_held(monkeypatch):
    length = 512
    monkeypatch.setattr(matching_reference, "BLOCK_BYTES", 4 * 2 * length * 16)  # 16 rows of two heads
    args = make(length, (2, 1, 1, 2), batch=1, dtype=torch.float32)
    with Largest() as largest:
        mixing_distance(**args).sum().backward()
    assert largest.elements <= 16 * 2 * length


def test_the_teacher_and_the_norm_get_no_gradient():
    args = make(5)
    for name in ("q", "k"):
        args[name].requires_grad_()
    distance, norm = mixing_distance(**args, return_norm=True)
    assert distance.requires_grad and not norm.requires_grad
    distance.sum().backward()
    assert args["q"].grad is None and args["k"].grad is None and args["C"].grad is not None


def test_dtypes_and_autocast():
    args = make(20, dtype=torch.float32)
    want = mixing_distance(**args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixing_distance(**args), want)  # float32 all the same
    half = {k: v.bfloat16() if k in ("q", "k", "B", "C") else v for k, v in args.items()}
    got = mixing_distance(**half)
    assert got.dtype == torch.float32
    assert torch.equal(got, mixing_distance(**{k: v.float() for k, v in half.items()}))


def test_cpu_tensors_take_the_reference(monkeypatch):
    args = make(3, dtype=torch.float32)
    monkeypatch.setattr(matching.reference, "mixing_distance", lambda *args, **kwargs: "reference")
    assert mixing_distance(**args) == mixing_distance(**args, backend="torch") == "reference"
    with pytest.raises(ValueError, match='^backend: expected "auto", "triton" or "torch", got \'cuda\'$'):
        mixing_distance(**args, backend="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(2, 6, 3, 4)), r"^q: expected shape \(B, L, H, P\) with \(B, L, H\) = \(2, 6, 4\), got"),
        (dict(k=torch.zeros(2, 6, 3, 4)), r"^k: expected a number of heads that divides H = 4, got 3$"),
        (dict(k=torch.zeros(2, 6, 2, 5)), r"^k: expected shape \(B, L, heads, P\) with \(B, L\) = \(2, 6\) and P = 4"),
        (dict(B=torch.zeros(2, 6, 3, 3)), r"^B: expected a number of heads that divides H = 4, got 3$"),
        (dict(C=torch.zeros(2, 6, 4, 2)), r"^C: expected the state size of B, N = 3, got 2$"),
        (dict(dt=torch.zeros(2, 6)), r"^dt: expected shape \(B, L, H\), got \(2, 6\)$"),
        (dict(A=torch.zeros(3)), r"^A: expected shape \(H\) = \(4,\), got \(3,\)$"),
        (dict(dt_bias=torch.zeros(1)), r"^dt_bias: expected shape \(H\) = \(4,\)"),
        (dict(seq_idx=torch.zeros(6, dtype=torch.int32)), r"^seq_idx: expected shape \(B, L\) = \(2, 6\)"),
        (dict(seq_idx=torch.zeros(2, 6)), r"^seq_idx: expected integers, got torch.float32$"),
        (dict(mask=torch.ones(2, 5)), r"^mask: expected shape \(B, L\) = \(2, 6\)"),
        (dict(scale=0), r"^scale: expected a positive number, got 0$"),
        (dict(softcap=-1.0), r"^softcap: expected a positive number, got -1.0$"),
        (dict(window=0), r"^window: expected a positive integer, got 0$"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        mixing_distance(**{**make(6), **change})


def test_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="^dt: expected at least one token, got L = 0$"):
        mixing_distance(**make(0))
