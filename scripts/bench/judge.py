"""What a measurement is worth: ours against float64, before it is timed; then peers, and the targets of a row."""

import math
import time

import torch
from torch import Tensor

from .cases import Case
from .inputs import randn
from .meter import Meter

OURS = "transpoint"
TOLERANCE = 1e-2  # relative L2 error of bfloat16 work against float64
PEER_TOLERANCE = 5e-2  # a peer further from the reference computes something else, and is no measure
CONTEXT = ("attention",)  # implementations whose name starts so compute something else: shown, never the best peer


def check(case: Case, inputs: dict[str, Tensor], meter: Meter) -> tuple[dict[str, float], Tensor, float]:
    """Relative L2 errors of our outputs and gradients at the timed shape, on the slice that the reference computes.

    The gradient of the output is zero outside the slice. So the reference, which sees the slice alone, must find the
    same gradients, and ours must be zero outside.

    Returns:
        The errors by name, the reference's output, and the seconds of our first call, compilation included.
    """
    copies = {name: t.detach().clone() for name, t in inputs.items()}
    slices = {n: (case.cut(t) if n in case.sliced else t).double() for n, t in copies.items()}
    for name in case.leaves:
        copies[name].requires_grad_()
        slices[name] = slices[name].detach().requires_grad_()
    meter.poison()
    start = time.perf_counter()
    y = case.ours(**copies)
    dy = torch.zeros_like(y)
    case.cut(dy).copy_(randn(case.cut(dy).shape, dy.device))
    grads = torch.autograd.grad(y, [copies[n] for n in case.leaves], dy) if case.leaves else ()
    meter.sync()
    seconds = time.perf_counter() - start

    y_ref = case.reference(**slices)
    errors = {"y": relative(case.cut(y), y_ref) if torch.isfinite(y).all() else math.nan}
    errors.update({name: relative(case.cut(copies[name]), slices[name]) for name in case.mutated})
    grads_ref = torch.autograd.grad(y_ref, [slices[n] for n in case.leaves], case.cut(dy).double()) if grads else ()
    for name, grad, ref in zip(case.leaves, grads, grads_ref, strict=True):
        if name in case.sliced:
            outside = grad.clone()
            case.cut(outside).zero_()
            errors["d" + name] = math.hypot(relative(case.cut(grad), ref), (outside.norm() / ref.norm()).item())
        else:
            errors["d" + name] = relative(grad, ref)
    return errors, y_ref.detach(), seconds


def relative(out: Tensor, ref: Tensor) -> float:
    """Relative L2 error; NaN stays NaN."""
    return ((out.double() - ref).norm() / ref.norm().clamp_min(1e-300)).item()


# Of a record, one pass of a case, as `run.run_case` makes it.


def is_wrong(record: dict) -> bool:
    """Whether our numbers may not be used: it did not run, or the check failed."""
    _, error = worst_error(record)
    return error is None or not error <= TOLERANCE or "refuses" in record["results"].get(OURS, {"refuses": ""})


def worst_error(record: dict) -> tuple[str | None, float | None]:
    """Whose of our relative errors is the largest, and that error; NaN is larger than anything."""
    numbers = {n: e for n, e in record["errors"].items() if isinstance(e, (int, float))}
    if not numbers:
        return None, None
    name = max(numbers, key=lambda n: math.inf if math.isnan(numbers[n]) else numbers[n])
    return name, numbers[name]


def best_peer(record: dict) -> tuple[str | None, float | None]:
    """Name and milliseconds of the fastest peer that does the same work; where it refuses graphs, its eager time."""
    times = {
        kind: time_of(result)
        for kind, result in record["results"].items()
        if kind != OURS
        and not kind.startswith(CONTEXT)
        and result.get("error", 0) <= PEER_TOLERANCE
        and time_of(result)
    }
    return min(times.items(), key=lambda item: item[1]) if times else (None, None)


def time_of(result: dict, mode: str = "graph") -> float | None:
    return result.get(f"{mode}_ms") or result.get("eager_ms")


def verdict(record: dict, target: dict) -> tuple[str, bool | None]:
    """What a target came to, in words, and whether it was met: None where nothing was measured.

    A target is {"of": PEER, "times": N, "mode": "graph" | "eager"}, at least N times as fast as that peer;
    {"of": "floor", "within": N}; or {"of": "memory", "mb": N}.
    """
    ours, mode = record["results"].get(OURS, {}), target.get("mode", "graph")
    ms = time_of(ours, mode)
    if target["of"] == "memory":
        text, value = f"at most {target['mb']} MB", ours.get("peak_mb")
    elif target["of"] == "floor":
        text, value = f"within {target['within']} of the floor", ms and ms / record["floor_ms"]
    else:
        theirs = time_of(record["results"].get(target["of"], {}), mode)
        text = f"{target['times']} x {target['of']}" + (", eager" if mode == "eager" else "")
        value = ms and theirs and theirs / ms
    if not value:
        return f"{text}: not measured", None
    met = value >= target["times"] if "times" in target else value <= target.get("within", target.get("mb"))
    return f"{text}: {value:.{0 if 'mb' in target else 2}f}", met
