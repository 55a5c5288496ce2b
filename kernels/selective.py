"""Mamba-1's selective scan: over whole sequences, and one decoding step.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = h_t C_t + D x_t

(Gu and Dao 2023, arXiv 2312.00752, algorithm 2.) B and C may each have fewer groups than there are channels: channel i
of d reads group i // (d/G). selective_reference.py has the same functions in plain PyTorch.
"""

from .selective_reference import selective_scan, selective_step

__all__ = ["selective_scan", "selective_step"]
