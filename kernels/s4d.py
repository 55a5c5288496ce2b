"""S4D, a diagonal state space that does not depend on its input: the scan over whole sequences, and one decoding step.

    h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A x_t        y_t = Re(C . h_t) + D x_t

(Gu, Gupta, Goel and Re 2022, arXiv 2206.11893, by zero-order hold, with B in C.) Each channel has M modes of its own:
real ones, or complex ones, of which each stands for its conjugate too, so that what is read of it counts twice. Complex
numbers lie in a dimension of 2, first the real parts, and then the imaginary ones, as compilers want them; real numbers
in one of 1.

Plain PyTorch throughout: it runs wherever PyTorch does.
"""

import math

import torch
import torch.nn.functional as F

from .ssd_reference import _check_shape, _compute_dtype, _documents

DEFAULT_CHUNK_SIZE = 64


def s4d_scan(
    x,
    dt,
    A,
    C,
    *,
    D=None,
    initial_state=None,
    seq_idx=None,
    return_final_state=False,
    chunk_size=None,
):
    """Run the recurrence over whole sequences, by chunks.

    What a token reads of its own chunk is a convolution with the kernel C exp(dt A)^k (exp(dt A) - 1) / A, a product
    with a Vandermonde matrix; of earlier chunks it reads the state. The convolution is laid out so that documents need
    no matrices of their own: a chunk's second half reads its first, then the same of each half, down to one token. As
    documents lie in one piece, only the last one of a first half goes on in the second: so there is a mask on what is
    read, and one on what reads. Nothing of another document enters any sum, and no shape depends on where they end.

    Everything is computed in float32 (float64 if x is float64), under autocast too. Differentiable in every floating
    argument.

    Args:
        x: (B, L, E) inputs, of E channels.
        dt: (E,) positive step sizes.
        A: (E, 2, M) complex, or (E, 1, M) real, rates of the modes; with negative real parts.
        C: output weights, shaped as A.
        D: (E,) skip weights, or None for no skip.
        initial_state: (B, E, 2 or 1, M) state before the first token, or None for zeros.
        seq_idx: (B, L) integers, the document of each token. The state is reset to zero wherever the value changes;
            initial_state belongs to the document of the first token.
        return_final_state: also return the state after the last token.
        chunk_size: the most tokens a chunk may have, a power of two; None takes 64.

    Returns:
        y (B, L, E) in x.dtype; with return_final_state, (y, state), where state, shaped as initial_state, is float32
        (float64).

    Raises:
        ValueError: a shape, L = 0, chunk_size or the type of seq_idx does not fit.
    """
    _check(x, dt, A, C, D, initial_state, seq_idx, chunk_size)
    length = x.shape[1]
    size = chunk_size or DEFAULT_CHUNK_SIZE
    while size >= 2 * length:
        size //= 2
    chunks = math.ceil(length / size)
    padding = -length % size
    with torch.autocast(x.device.type, enabled=False):
        dtype = _compute_dtype(x)
        dt, A, C = (t.to(dtype) for t in (dt, A, C))
        inputs = F.pad(x.to(dtype).permute(2, 0, 1), (0, padding)).contiguous()  # (E, B, c*Q), zeros after the last
        by_chunk = inputs.unflatten(-1, (chunks, size))
        document = _documents(seq_idx, chunks, padding)
        before = None  # that of the state entering each chunk
        if document is not None:
            before = torch.cat((document[:, :1, 0], document[:, :-1, -1]), 1)
            # What of a chunk is left at its end.
            by_chunk = by_chunk.masked_fill(document != document[..., -1:], 0)

        step = dt[:, None, None] * A
        powers = _exp(step[:, None] * torch.arange(size + 1, device=x.device)[:, None, None])  # (E, Q+1, 2 or 1, M)
        # What a token adds to a state has the same factor at all of them. States have it where they come in and go out,
        # and in here only what reads them has.
        gain = _divide(_expm1(step), A)
        read = _weights(_times(powers, _times(gain, C)[:, None]))
        y = _convolve(inputs, read[:, :-1, 0].sum(-1), document)
        if D is not None:
            y = y + D.to(dtype)[:, None, None] * inputs
        state = None if initial_state is None else _divide(initial_state.to(dtype).transpose(0, 1), gain[:, None])
        written = powers[:, :-1].flatten(2)  # (E, Q, N), after so many more tokens
        states = _entering(by_chunk[:, :, :-1], written, step * size, state, before)
        old = (states.flatten(1, 2).flatten(2) @ read[:, 1:].flatten(2).mT).unflatten(1, (-1, chunks))
        if document is not None:
            old = old.masked_fill(document != before[..., None], 0)
        y = (y + old.flatten(2))[..., :length].permute(1, 2, 0).to(x.dtype)
        if not return_final_state:
            return y
        left = size - padding  # tokens of the last chunk
        kept = _times(states[:, :, -1], powers[:, left, None])
        if document is not None:
            kept = kept.masked_fill((before[:, -1] != document[:, -1, -1])[:, None, None], 0)
        new = by_chunk[:, :, -1, :left] @ written[:, :left].flip(1)
        state = _times(kept + new.unflatten(-1, A.shape[1:]), gain[:, None])
        return y, state.transpose(0, 1).contiguous()


@torch.no_grad()
def s4d_step(state, x, dt, A, C, *, D=None):
    """Advance the recurrence by one token, for decoding. Not differentiable.

    Args:
        state: (B, E, 2 or 1, M) float32 (or float64), updated in place.
        x: (B, E); dt, A, C, D: as in s4d_scan.

    Returns:
        y (B, E) in x.dtype.

    Raises:
        ValueError: a shape does not fit.
    """
    _check(x[:, None], dt, A, C, D, state)
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(_compute_dtype(x), state.dtype)
        dt, A, C, inputs = (t.to(dtype) for t in (dt, A, C, x))
        step = dt[:, None, None] * A
        new = _times(state, _exp(step)) + _divide(_expm1(step), A) * inputs[..., None, None]
        state.copy_(new)
        y = (new * _weights(C)).sum((2, 3))
        y = y if D is None else y + D.to(dtype) * inputs
        return y.to(x.dtype)


def _convolve(inputs, kernel, document):
    """The causal convolution of inputs (E, B, c*Q) with a kernel (E, Q) within chunks and documents (B, c, Q)."""
    y, width = kernel[:, :1, None] * inputs, 1
    while width < kernel.shape[-1]:
        first = inputs.unflatten(-1, (-1, 2, width))[..., 0, :]
        if document is not None:
            halves = document.flatten(1).unflatten(-1, (-1, 2, width))
            last = halves[..., 0, -1:]
            first = first.masked_fill(halves[..., 0, :] != last, 0)
        # (E, w, w), from the s-th of the first half to the t-th of the second: kernel[w + t - s]
        matrix = kernel[:, 1 : 2 * width].flip(-1).unfold(-1, width, 1).flip(-2)
        second = (first.flatten(1, 2) @ matrix.mT).view(first.shape)
        if document is not None:
            second = second.masked_fill(halves[..., 1, :] != last, 0)
        y.unflatten(-1, (-1, 2, width))[..., 1, :].add_(second)
        width *= 2
    return y


def _entering(inputs, written, step, state, before):
    """States (E, B, c, 2 or 1, M) entering each chunk.

    Args:
        inputs: (E, B, c-1, Q) of all chunks but the last, zero where they are not of a chunk's last document.
        written: (E, Q, N). step: (E, 2 or 1, M) of a whole chunk. state: (E, B, 2 or 1, M) entering the first, or None.
        before: (B, c) documents of these states, or None.
    """
    added = (inputs.flatten(1, 2) @ written.flip(1)).view(*inputs.shape[:3], *step.shape[1:])
    state = added.new_zeros(*added.shape[:2], *step.shape[1:]) if state is None else state
    states, span = torch.cat((state[:, :, None], added), 2), 1
    while span < states.shape[2]:  # each has what the last `span` chunks have added; then twice as many
        carried = _times(states[:, :, :-span], _exp(step * span)[:, None, None])
        if before is not None:
            carried = carried.masked_fill((before[:, span:] != before[:, :-span])[..., None, None], 0)
        states = torch.cat((states[:, :, :span], states[:, :, span:] + carried), 2)
        span *= 2
    return states


def _weights(c):
    """By which parts of a state are to be multiplied so that their sum is Re(c . h), of pairs twice that."""
    return c if c.shape[-2] == 1 else torch.stack((2 * c[..., 0, :], -2 * c[..., 1, :]), -2)


def _times(a, b):
    if a.shape[-2] == 1:
        return a * b
    (a, ai), (b, bi) = a.unbind(-2), b.unbind(-2)
    return torch.stack((a * b - ai * bi, a * bi + ai * b), -2)


def _divide(a, b):
    if b.shape[-2] == 1:
        return a / b
    conjugate = torch.stack((b[..., 0, :], -b[..., 1, :]), -2)
    return _times(a, conjugate) / b.square().sum(-2, keepdim=True)


def _exp(z):
    if z.shape[-2] == 1:
        return z.exp()
    size, angle = z[..., 0, :].exp(), z[..., 1, :]
    return torch.stack((size * angle.cos(), size * angle.sin()), -2)


def _expm1(z):
    """exp(z) - 1, without cancellation where z is small."""
    if z.shape[-2] == 1:
        return z.expm1()
    size, angle = z.unbind(-2)
    return torch.stack((size.expm1() * angle.cos() - 2 * (angle / 2).sin().square(), size.exp() * angle.sin()), -2)


def _check(x, dt, A, C, D, state, seq_idx=None, chunk_size=None):
    """Raise a ValueError if the arguments do not fit together."""
    if x.dim() != 3:
        raise ValueError(f"x: expected shape (B, L, E), got {tuple(x.shape)}")
    batch, length, channels = x.shape
    if batch == 0 or length == 0:
        raise ValueError(f"x: expected at least one token, got {'B' if batch == 0 else 'L'} = 0")
    if A.dim() != 3 or len(A) != channels or A.shape[1] not in (1, 2):
        raise ValueError(f"A: expected shape (E, 2 or 1, M) with E = {channels}, got {tuple(A.shape)}")
    _check_shape("C", C, "as A", tuple(A.shape))
    _check_shape("dt", dt, "E", (channels,))
    if D is not None:
        _check_shape("D", D, "E", (channels,))
    if state is not None:
        _check_shape("state", state, "B, E, 2 or 1, M", (batch, *A.shape))
    if seq_idx is not None:
        _check_shape("seq_idx", seq_idx, "B, L", (batch, length))
        if seq_idx.is_floating_point() or seq_idx.is_complex():
            raise ValueError(f"seq_idx: expected integers, got {seq_idx.dtype}")
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size: expected a power of two, got {chunk_size}")
