"""TransPoints: at which token each layer passes from attention to the state-space form, and the named schedules.

This file travels with exported checkpoints: it imports nothing but the standard library.
"""

import math
from typing import Any, cast

from .configuration_mixers import have_trans_points, is_attention
from .errors import StudentError

# Cycled over the layers. The two named after the TransMamba paper (arXiv 2503.24067) are those of its ablation, where
# at equal training they reached a validation loss of 2.90 and 3.02, one shared TransPoint 3.30 or more.
_CYCLES: dict[str, tuple[int | float, ...]] = {
    "paper-v9": (0, 128, 256, 512, 1024, 2048, 4096, 8192),
    "paper-coarse": (0, 1024, 2048, 6144, 8192),
    "teacher": (math.inf,),
    "mamba": (0,),
}
LOG_CYCLE = 8  # layers
SCHEDULES = {
    "paper-v9": "0, 128, 256, 512, 1024, 2048, 4096, 8192, over and over",
    "paper-coarse": "0, 1024, 2048, 6144, 8192, over and over",
    "log": "log:N for the longest N the model was made for",
    "log:N": "0, N/64, N/32, N/16, N/8, N/4, N/2, N, over and over",
    "uniform:N": "N in every layer",
    "teacher": "inf in every layer: attention alone",
    "mamba": "0 in every layer: the state-space form alone",
}


def parse_trans_points(spec: Any, num_layers: int, longest: int | None = None) -> list[int | float]:
    """The TransPoint of each layer: its first so many tokens take attention, later ones the state-space form.

    Args:
        spec: a number of tokens or "inf" for every layer, a list of these with one for each layer, or the name of a
            schedule (`SCHEDULES`).
        num_layers: how many layers the model has.
        longest: the longest sequence the model was made for, which "log" needs.

    Returns:
        One entry for each layer: an int of at least 0, or `math.inf`.

    Raises:
        StudentError: anything else.
    """
    if isinstance(spec, str) and spec != "inf":
        return _schedule(spec, num_layers, longest)
    if isinstance(spec, list | tuple):
        if len(spec) != num_layers:
            raise StudentError(f"trans_points has {len(spec)} entries, the model has {num_layers} layers")
        return [_point(point, spec) for point in spec]
    return [_point(spec, spec)] * num_layers


def fixed_point(mixer: str, point: Any) -> Any:
    """The TransPoint of a layer with this mixer, or "attention": `point` where it can be chosen."""
    return math.inf if is_attention(mixer) else point if have_trans_points([mixer]) else 0


def written(trans_points: list[int | float]) -> list[int | str]:
    """The same as JSON can hold it: infinity as "inf"."""
    return ["inf" if point == math.inf else cast("int", point) for point in trans_points]


def _point(point: Any, spec: Any) -> int | float:
    if point == "inf":
        return math.inf
    if isinstance(point, int | float) and not isinstance(point, bool) and point >= 0:
        if point == math.inf:
            return math.inf
        if point == int(point):
            return int(point)
    if spec is point:
        raise _unknown(spec)
    raise StudentError(f"trans_points holds {point!r}; expected a number of tokens, 0 or more, or inf")


def _schedule(name: str, num_layers: int, longest: int | None) -> list[int | float]:
    word, colon, number = name.partition(":")
    if name in _CYCLES:
        cycle = _CYCLES[name]
    elif word in ("uniform", "log") and colon and number.isascii() and number.isdigit():
        cycle = (int(number),) if word == "uniform" else _log_cycle(int(number))
    elif name == "log":
        if longest is None:
            raise StudentError("trans_points 'log' needs a length here: write log:N, with the longest TransPoint N")
        cycle = _log_cycle(longest)
    else:
        raise _unknown(name)
    return [cycle[layer % len(cycle)] for layer in range(num_layers)]


def _log_cycle(longest: int) -> tuple[int, ...]:
    return (0, *(longest >> halvings for halvings in range(LOG_CYCLE - 2, -1, -1)))


def _unknown(spec: Any) -> StudentError:
    return StudentError(
        f"trans_points is {spec!r}; expected a number of tokens, 'inf', a list with one of these for each layer, or a "
        f"schedule: {', '.join(SCHEDULES)}"
    )
