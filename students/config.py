"""What a recipe says of the student."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import StudentError
from .modeling_hybrid import MIXERS


@dataclass
class StudentConfig:
    """Which layers become mixers, and which parts a mixer has."""

    mixer: str = field(default="mamba2", metadata={"help": "what replaces attention: mamba2"})
    keep_attention: Any = field(
        default="every:2",
        metadata={
            "help": "layers that keep attention: a list of indices (negative ones count from the end), 'every:N' "
            "(the last layer of every N), or a fraction of the layers, evenly spaced"
        },
    )
    conv_kernel: int = field(default=4, metadata={"help": "taps of the causal convolution over x, B and C, 1 to 4"})
    conv_activation: str | None = field(default="silu", metadata={"help": "after the convolution: silu or null"})
    gate: bool = field(default=True, metadata={"help": "whether the output is gated by SiLU(z)"})
    norm: bool = field(default=True, metadata={"help": "whether the gated output is RMS-normalised, head by head"})
    rope: bool = field(
        default=False,
        metadata={"help": "whether B and C take the teacher's rotary embedding (no native format has it)"},
    )
    qk_norm: bool = field(
        default=True, metadata={"help": "whether B and C take the teacher's k/q norms, where it has them"}
    )

    def check(self) -> None:
        """Raises StudentError for a value that no student can have, whatever the teacher."""
        if self.mixer not in MIXERS:
            raise StudentError(f"student.mixer is '{self.mixer}'; expected one of {', '.join(MIXERS)}")
        if not 1 <= self.conv_kernel <= 4:
            raise StudentError(f"student.conv_kernel is {self.conv_kernel}; expected 1 to 4")
        if self.conv_activation not in ("silu", None):
            raise StudentError(f"student.conv_activation is '{self.conv_activation}'; expected silu or null")
        kept_layers(self.keep_attention, None)

    @property
    def mixer_options(self) -> dict:
        """Keyword arguments of the mixer's class."""
        names = ("conv_kernel", "conv_activation", "gate", "norm", "rope", "qk_norm")
        return {name: getattr(self, name) for name in names}


def layer_plan(config: StudentConfig, num_layers: int) -> list[str]:
    """The mixer of each layer, "attention" where it is kept.

    Raises:
        StudentError: `keep_attention` names a layer that is not there, is malformed, or keeps every layer.
    """
    kept = kept_layers(config.keep_attention, num_layers)
    if len(kept) == num_layers:
        raise StudentError(
            f"student.keep_attention is {config.keep_attention!r}: all {num_layers} layers keep attention, "
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
