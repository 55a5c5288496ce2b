"""Sliding-window attention beside a Mamba-2 state. This file travels with exported checkpoints."""

from .window import WindowMixer


class WindowMamba2Mixer(WindowMixer):
    """Window and sinks beside the recurrence of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060):

    S_t = exp(dt_t A) S_{t-1} + dt_t v_t B_t^T
    r_t = S_t C_t + D v_t

    Arguments as `WindowMixer`.
    """
