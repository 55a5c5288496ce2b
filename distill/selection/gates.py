"""Which layers should keep attention, by gates that are trained jointly.

Each layer gives a mixture of attention's output and of what stands in for it, and a pressure on all gates closes those
that are missed least first. Only gates are trained; after FlashMorph (arXiv 2606.30562), which trains more.
"""

import torch

from .judge import Judge


def trained_gates(
    judge: Judge, steps: int, lr: float, pressure: float, kl_weight: float, recall_weight: float
) -> dict[int, float]:
    """For each layer the mean of its gate over the steps, from 0 to 1: the later it closes, the larger.

    The pressure, which multiplies the mean of all gates, grows from 0 to `pressure`.

    Args:
        lr: of Adam, on the gates' logits.
        kl_weight, recall_weight: of the KL of a token of text, and of what a token of an answer lost.
    """
    logits = torch.full((len(judge.candidates),), 3.0, device=judge.teacher.device, requires_grad=True)
    optimizer, seen = torch.optim.Adam([logits], lr=lr), torch.zeros_like(logits, requires_grad=False)
    for step in range(steps):
        gates = logits.sigmoid()
        seen += gates.detach() / steps
        optimizer.zero_grad()
        for number in range(len(judge.passes)):
            kl, recall = judge.losses(gates, number)
            (kl_weight * kl + recall_weight * recall).backward(retain_graph=True)
            judge.on_measured()
        (pressure * step / steps * gates.mean()).backward()
        optimizer.step()
    return dict(zip(judge.candidates, seen.tolist(), strict=True))
