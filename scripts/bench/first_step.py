"""How long the first training step of a process takes: with an empty cache of compiled kernels, and with a full one."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transpoint.kernels.conv import causal_conv1d
from transpoint.kernels.kl import linear_kl
from transpoint.kernels.norm import gated_rms_norm
from transpoint.kernels.ssd import ssd_scan

from .cases import Maker
from .inputs import leaf

ROOT = Path(__file__).resolve().parents[2]


def first_step(device: str) -> dict[str, float]:
    """Seconds of the first `training_step` of a new process, compiling its kernels and finding them compiled."""
    run = [sys.executable, "-m", "scripts.bench", "--first-step", "--device", device]
    with tempfile.TemporaryDirectory() as folder:
        options = {"cwd": ROOT, "env": {**os.environ, "TRITON_CACHE_DIR": folder}}
        runs = [subprocess.run(run, capture_output=True, text=True, check=True, **options) for _ in range(2)]
    return dict(zip(("compiling", "cached"), (float(r.stdout.split()[-1]) for r in runs), strict=True))


def training_step(device: str) -> float:
    """One forward and backward pass of every op a Mamba-2 layer and its loss train with; returns the seconds taken."""
    maker = Maker(device)
    length, vocab = (512, 4096) if maker.device.type == "cuda" else (16, 64)
    x, taps = leaf(maker.randn(2, length, 2304)), leaf(maker.randn(2304, 4))
    gate, scale = maker.randn(2, length, 576), leaf(maker.randn(576))
    hidden, head, other = (leaf(maker.randn(rows, 576)) for rows in (2 * length, vocab, vocab))
    start = time.perf_counter()
    mixed = causal_conv1d(x, taps, activation="silu", **maker.backend)
    values, keys, queries, _ = mixed.split([192, 192, 576, 1344], -1)
    x, B, C = (t.unflatten(-1, (-1, 64)) for t in (values, keys, queries))
    y = ssd_scan(x=x, B=B, C=C, **maker.steps(2, length, 9), **maker.backend)
    y = gated_rms_norm(y.flatten(2), scale, gate, groups=9, **maker.backend)
    loss = y.float().mean() + linear_kl(hidden, head, hidden.detach(), other.detach(), **maker.backend)
    loss.backward()
    loss.item()
    return time.perf_counter() - start
