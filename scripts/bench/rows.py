"""Which shapes are measured, and what each should reach."""

import torch

from .cases import Case, Maker
from .floors import BOTH, FORWARD, STEP


def full(maker: Maker) -> list[Case]:
    """The rows of docs/results/kernels.md, the most important first."""
    bf16 = torch.bfloat16
    return [
        wanted(
            maker.scan(8, 4096, 32, 64, 64, plain=True),
            {
                FORWARD: [times(3), times(1, "fla core")],
                BOTH: [times(4), times(1, "attention, cuDNN")],
            },
        ),
        wanted(maker.scan(8, 4096, 32, 64, 128, groups=1), {FORWARD: [times(2.5)], BOTH: [times(2.5)]}),
        wanted(maker.scan(8, 2048, 9, 64, 64, kv=3, plain=True), {BOTH: [times(4), times(4, mode="eager")]}),
        wanted(maker.kl(8192, 576, 49152), {BOTH: [floor(1.4), memory(400)]}),
        wanted(maker.step(256, 32, 64, 128, groups=1), {STEP: [floor(1.15)]}),
        wanted(maker.step(256, 32, 64, 128, groups=1, state_dtype=bf16), {STEP: [floor(1.3)]}),
        wanted(maker.conv(8, 4096, 2304), {BOTH: [floor(1.6)]}),
        wanted(maker.scan(2, 16384, 32, 64, 128, groups=1), {BOTH: [times(2.5)]}),
        wanted(maker.scan(1, 65536, 32, 64, 128, groups=8, attention=1), {BOTH: [times(2.5)]}),
        wanted(maker.kl(8192, 2048, 128256), {BOTH: [floor(1.25), memory(1300)]}),
        maker.delta(8, 4096, 32, 128, 128, keys=16),
        maker.delta(8, 2048, 9, 64, 64, keys=9),
        maker.delta_step(256, 32, 128, 128, keys=16),
        maker.selective(8, 4096, 2048, 16, groups=1),
        maker.selective(8, 2048, 576, 64, groups=9),
        maker.selective_step(256, 2048, 64, groups=32),
        maker.norm(32768, 2048),
        maker.norm(16384, 576, groups=9),
        maker.conv(8, 2048, 960),
        maker.distance(8, 2048, 9, 64, 64, kv=3),
        maker.step(64, 32, 64, 128, groups=1),
        maker.step(256, 9, 64, 64, kv=3),
        maker.conv_step(256, 2304),
        maker.distance(2, 4096, 32, 64, 64, kv=8),
    ]


def quick(maker: Maker) -> list[Case]:
    """Tiny shapes, every op."""
    return [
        maker.scan(2, 96, 4, 16, 16, kv=2, plain=True),
        maker.scan(1, 64, 4, 16, 32, groups=1, attention=1),
        maker.step(4, 4, 16, 32, groups=1),
        maker.step(4, 4, 16, 16, kv=2, state_dtype=torch.bfloat16),
        maker.delta(2, 70, 4, 16, 16, keys=2),
        maker.delta_step(4, 4, 16, 32, keys=2),
        maker.selective(2, 20, 12, 4, groups=2),
        maker.selective_step(4, 12, 4, groups=2),
        maker.conv(2, 70, 48),
        maker.conv_step(4, 48),
        maker.norm(64, 96, groups=3),
        maker.kl(48, 32, 200),
        maker.distance(2, 80, 4, 16, 16, kv=2),
    ]


def wanted(case: Case, targets: dict[str, list[dict]]) -> Case:
    case.targets = targets  # by pass, as the JSON has them
    return case


def times(factor: float, of: str = "mamba_ssm", mode: str = "graph") -> dict:
    """At least so many times as fast as a peer, replayed from a graph or launched from Python."""
    return {"of": of, "times": factor, "mode": mode}


def floor(within: float) -> dict:
    return {"of": "floor", "within": within}


def memory(mb: float) -> dict:
    return {"of": "memory", "mb": mb}
