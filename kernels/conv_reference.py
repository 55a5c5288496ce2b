"""The short causal depthwise convolution of Mamba layers in plain PyTorch: whole sequences, and one decoding step."""

import torch
import torch.nn.functional as F


def causal_conv1d(x, weight, bias=None, *, activation=None, seq_idx=None, initial_state=None, return_final_state=False):
    """Convolve each channel with its own W taps over the current and the W - 1 previous tokens.

    y[t] = activation(bias + sum_k weight[:, W-1-k] x[t-k]): weight[:, -1] multiplies the current token, as in
    Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3.4). Computed in float32 (float64 if x is float64).
    Differentiable in x, weight, bias and initial_state.

    Args:
        x: (B, L, C), channels last.
        weight: (C, W), W >= 1.
        bias: (C,) or None.
        activation: None or "silu".
        seq_idx: (B, L) integers, the document of each token: taps do not reach across a change of the value.
            initial_state belongs to the document of the first token.
        initial_state: (B, C, W-1), the inputs just before the first token, oldest first; None for zeros.
        return_final_state: also return the last W - 1 inputs.

    Returns:
        y (B, L, C) in x.dtype; with return_final_state, (y, state): state (B, C, W-1) in x.dtype holds the last inputs
        of the last document, oldest first, with initial_state or zeros in front where it has fewer than W - 1.

    Raises:
        ValueError: a shape, L = 0, the type of seq_idx or activation does not fit.
    """
    width = _check_sequence(x, weight, bias, activation, seq_idx, initial_state)
    length = x.shape[1]
    inputs = _inputs(x, width, initial_state)
    document = None if seq_idx is None else _documents(seq_idx, width)

    # As fast as F.conv1d(groups=C) on CPU, forward + backward (B=2, L=256, C=960, W=4), and it can mask taps.
    dtype = _compute_dtype(x)
    taps = weight.to(dtype).unbind(1)
    inputs_ = inputs.to(dtype)
    y = x.to(dtype) * taps[-1] if bias is None else torch.addcmul(bias.to(dtype), x.to(dtype), taps[-1])
    for k in range(width - 1):
        shifted = inputs_[:, k : k + length]
        if seq_idx is not None:
            foreign = document[:, k : k + length] != document[:, width - 1 :]
            shifted = shifted.masked_fill(foreign.unsqueeze(-1), 0)
        y = torch.addcmul(y, shifted, taps[k])
    y = (F.silu(y) if activation == "silu" else y).to(x.dtype)
    return (y, _final_state(x, width, seq_idx, initial_state)) if return_final_state else y


@torch.no_grad()
def causal_conv1d_step(x, conv_state, weight, bias=None, *, activation=None):
    """Convolve one token, for decoding. Not differentiable.

    Args:
        x: (B, C).
        conv_state: (B, C, W-1), the last inputs, oldest first; updated in place.
        weight, bias, activation: as in causal_conv1d.

    Returns:
        y (B, C) in x.dtype.

    Raises:
        ValueError: a shape or activation does not fit.
    """
    _check_step(x, conv_state, weight, bias, activation)
    dtype = _compute_dtype(x)
    window = torch.cat([conv_state.to(dtype), x.to(dtype).unsqueeze(-1)], -1)
    conv_state.copy_(window[..., 1:])
    y = (window * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def _inputs(x, width, initial_state):
    """The inputs from W - 1 tokens before the first on, (B, W - 1 + L, C)."""
    if initial_state is None:
        return F.pad(x, (0, 0, width - 1, 0))
    return torch.cat([initial_state.to(x.dtype).mT, x], 1)


def _documents(seq_idx, width):
    """Number the documents of these inputs, so that a value that comes back later is another document."""
    return F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1), (width, 0))


def _final_state(x, width, seq_idx, initial_state):
    """The state after x: see causal_conv1d."""
    length = min(x.shape[1], width - 1)
    state = x[:, x.shape[1] - length :]
    if length < width - 1:
        state = _inputs(state, width, initial_state)[:, length:]
    if seq_idx is not None:
        document = _documents(seq_idx[:, seq_idx.shape[1] - length :], width)
        state = state.masked_fill((document[:, length:] != document[:, -1:]).unsqueeze(-1), 0)
    return state.clone(memory_format=torch.contiguous_format).mT  # channels together: a step reads it faster


def _compute_dtype(t):
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _check_sequence(x, weight, bias, activation, seq_idx, initial_state):
    """Check the arguments of causal_conv1d and return the width W."""
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x: expected shape (B, L, C) with L >= 1, got {tuple(x.shape)}")
    batch, length, channels = x.shape
    width = _check_weights(weight, bias, activation, channels)
    if initial_state is not None:
        _check_shape("initial_state", initial_state, "B, C, W-1", (batch, channels, width - 1))
    if seq_idx is not None:
        _check_shape("seq_idx", seq_idx, "B, L", (batch, length))
        if seq_idx.is_floating_point() or seq_idx.is_complex():
            raise ValueError(f"seq_idx: expected integers, got {seq_idx.dtype}")
    return width


def _check_step(x, conv_state, weight, bias, activation):
    """Check the arguments of causal_conv1d_step and return the width W."""
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (B, C), got {tuple(x.shape)}")
    width = _check_weights(weight, bias, activation, x.shape[1])
    _check_shape("conv_state", conv_state, "B, C, W-1", (*x.shape, width - 1))
    return width


def _check_weights(weight, bias, activation, channels):
    """Check what both functions share and return the width W."""
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise ValueError(f"weight: expected shape (C, W) with C = {channels}, W >= 1, got {tuple(weight.shape)}")
    if bias is not None:
        _check_shape("bias", bias, "C", (channels,))
    if activation not in (None, "silu"):
        raise ValueError(f'activation: expected None or "silu", got {activation!r}')
    return weight.shape[1]


def _check_shape(name, t, dims, shape):
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape ({dims}) = {shape}, got {tuple(t.shape)}")
