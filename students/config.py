"""What a recipe says of the student."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .configuration_transmamba import SCHEDULES, parse_trans_points
from .errors import StudentError
from .modeling_hybrid import MIXERS

# What is not set takes the mixer's own: Mamba-2 as the native formats have it, TransMamba as near attention as it is.
_DEFAULTS = {
    "mamba2": {
        "keep_attention": "every:2",
        "conv_kernel": 4,
        "conv_activation": "silu",
        "gate": True,
        "norm": True,
        "rope": False,
    },
    "transmamba": {
        "keep_attention": [],
        "conv_kernel": 0,
        "conv_activation": None,
        "gate": False,
        "norm": False,
        "rope": True,
    },
}


@dataclass
class StudentConfig:
    """Which layers become mixers, and which parts a mixer has. `resolved` fills in what depends on the mixer."""

    mixer: str = field(default="mamba2", metadata={"help": "what replaces attention: mamba2 or transmamba"})
    keep_attention: Any = field(
        default=None,
        metadata={
            "help": "layers that keep attention: a list of indices (negative ones count from the end), 'every:N' "
            "(the last layer of every N), or a fraction of the layers, evenly spaced; null: every:2 for mamba2, none "
            "for transmamba"
        },
    )
    trans_points: Any = field(
        default="paper-v9",
        metadata={
            "help": "transmamba: up to which token each layer takes attention: a number, inf, a list with one for each "
            f"layer, or a schedule: {', '.join(SCHEDULES)}"
        },
    )
    conv_kernel: int | None = field(
        default=None,
        metadata={
            "help": "taps of the causal convolution over x, B and C, 1 to 4; null: 4 for mamba2, none for transmamba"
        },
    )
    conv_activation: str | None = field(
        default="auto", metadata={"help": "after the convolution: silu or null; auto: silu for mamba2"}
    )
    gate: bool | None = field(
        default=None, metadata={"help": "whether the output is gated by SiLU(z); null: true for mamba2"}
    )
    norm: bool | None = field(
        default=None,
        metadata={"help": "whether the gated output is RMS-normalised, head by head; null: true for mamba2"},
    )
    rope: bool | None = field(
        default=None,
        metadata={
            "help": "whether B and C take the teacher's rotary embedding (no native format has it); null: true for "
            "transmamba"
        },
    )
    qk_norm: bool = field(
        default=True, metadata={"help": "whether B and C take the teacher's k/q norms, where it has them"}
    )

    def check(self) -> None:
        """Raises StudentError for a value that no student can have, whatever the teacher."""
        if self.mixer not in MIXERS:
            raise StudentError(f"student.mixer is '{self.mixer}'; expected one of {', '.join(MIXERS)}")
        own = self.resolved()
        least = 0 if self.mixer == "transmamba" else 1
        if not least <= own.conv_kernel <= 4:
            raise StudentError(f"student.conv_kernel is {own.conv_kernel}; expected {least} to 4")
        if own.conv_activation not in ("silu", None):
            raise StudentError(f"student.conv_activation is '{own.conv_activation}'; expected silu, null or auto")
        if own.conv_activation and not own.conv_kernel:
            raise StudentError(
                "student.conv_activation is 'silu' without a convolution; set student.conv_kernel, 1 to 4"
            )
        kept_layers(own.keep_attention, None)
        if self.mixer == "transmamba":
            points = own.trans_points
            parse_trans_points(points, len(points) if isinstance(points, list | tuple) else 1, longest=1)

    def resolved(self) -> "StudentConfig":
        """The same with the mixer's own defaults for what is not set. The mixer must be known."""
        defaults = _DEFAULTS[self.mixer]
        unset = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        if self.conv_activation is None:
            del unset["conv_activation"]
        elif self.conv_activation == "auto":
            unset["conv_activation"] = defaults["conv_activation"]
        return dataclasses.replace(self, **unset)

    @property
    def mixer_options(self) -> dict:
        """Keyword arguments of the mixer's class."""
        own = self.resolved()
        names = ("conv_kernel", "conv_activation", "gate", "norm", "rope", "qk_norm")
        return {name: getattr(own, name) for name in names}


def layer_plan(config: StudentConfig, num_layers: int) -> list[str]:
    """The mixer of each layer, "attention" where it is kept.

    Raises:
        StudentError: `keep_attention` names a layer that is not there, is malformed, or keeps every layer.
    """
    keep = config.resolved().keep_attention
    kept = kept_layers(keep, num_layers)
    if len(kept) == num_layers:
        raise StudentError(
            f"student.keep_attention is {keep!r}: all {num_layers} layers keep attention, "
            "so there is nothing to convert"
        )
    return ["attention" if layer in kept else config.mixer for layer in range(num_layers)]


def kept_layers(keep: Any, num_layers: int | None) -> set[int]:
    """Indices that `keep_attention` keeps among `num_layers` (None: only its form is checked)."""
    expected = "expected a list of layer indices, 'every:N' with N of at least 2, or a fraction from 0 to 1"
    if isinstance(keep, str):
        word, _, number = keep.partition(":")
        if word != "every" or not number.isdigit() or int(number) < 2:
            raise StudentError(f"student.keep_attention is '{keep}'; {expected}")
        return set(range(int(number) - 1, num_layers or 0, int(number)))
    if isinstance(keep, int | float) and not isinstance(keep, bool):
        if not 0 <= keep <= 1:
            raise StudentError(f"student.keep_attention is {keep}; {expected}")
        count = round(keep * (num_layers or 0))
        # The middle of each of `count` equal parts.
        return {int((i + 0.5) * num_layers / count) for i in range(count)}
    if not hasattr(keep, "__iter__") or isinstance(keep, Mapping):
        raise StudentError(f"student.keep_attention is {keep!r}; {expected}")
    kept = set()
    for layer in keep:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise StudentError(f"student.keep_attention holds {layer!r}; {expected}")
        if num_layers is not None and not -num_layers <= layer < num_layers:
            raise StudentError(f"student.keep_attention holds layer {layer}, the teacher has 0 to {num_layers - 1}")
        kept.add(layer % num_layers if num_layers else layer)
    return kept
