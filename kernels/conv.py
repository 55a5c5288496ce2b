"""The short causal depthwise convolution of Mamba layers: whole sequences, and one decoding step."""

from . import conv_reference as reference
from .backend import use_triton

MAX_WIDTH = 8  # of the Triton kernels, which keep W - 1 rows in registers


def causal_conv1d(
    x,
    weight,
    bias=None,
    *,
    activation=None,
    seq_idx=None,
    initial_state=None,
    return_final_state=False,
    backend="auto",
):
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
        backend: "auto" (Triton kernels on an NVIDIA GPU where they fit), "triton" or "torch" (the plain reference).

    Returns:
        y (B, L, C) in x.dtype; with return_final_state, (y, state): state (B, C, W-1) in x.dtype holds the last inputs
        of the last document, oldest first, with initial_state or zeros in front where it has fewer than W - 1.

    Raises:
        ValueError: a shape, L = 0, the type of seq_idx or activation does not fit; or the backend cannot run.
    """
    width = reference._check_sequence(x, weight, bias, activation, seq_idx, initial_state)
    if not use_triton(backend, x, _unsupported(width)):
        return reference.causal_conv1d(
            x,
            weight,
            bias,
            activation=activation,
            seq_idx=seq_idx,
            initial_state=initial_state,
            return_final_state=return_final_state,
        )
    from . import conv_triton

    y = conv_triton.causal_conv1d(x, weight, bias, seq_idx, initial_state, activation == "silu")
    return (y, reference._final_state(x, width, seq_idx, initial_state)) if return_final_state else y


def causal_conv1d_step(x, conv_state, weight, bias=None, *, activation=None, backend="auto"):
    """Convolve one token, for decoding. Not differentiable.

    Args:
        x: (B, C).
        conv_state: (B, C, W-1), the last inputs, oldest first; updated in place.
        weight: as in causal_conv1d.
        bias: likewise.
        activation: likewise.
        backend: likewise.

    Returns:
        y (B, C) in x.dtype.

    Raises:
        ValueError: a shape or activation does not fit; or the backend cannot run.
    """
    width = reference._check_step(x, conv_state, weight, bias, activation)
    if not use_triton(backend, x, _unsupported(width)):
        return reference.causal_conv1d_step(x, conv_state, weight, bias, activation=activation)
    from . import conv_triton

    return conv_triton.causal_conv1d_step(x, conv_state, weight, bias, activation == "silu")


def _unsupported(width):
    return f"W is at most {MAX_WIDTH}, got {width}" if width > MAX_WIDTH else None
