"""Which mixers there are, and what a recipe and a person know of each: no more than that, so that it loads at once.

A new mixer is a file of its own, with a `Mixer` in it, and an entry here. This file travels with exported checkpoints:
it imports nothing but the standard library.
"""

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Option:
    """What a recipe may set of a mixer: a keyword argument of its class."""

    default: Any
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple = ()
    kind: type[int] | None = None  # of a number that is null by default

    @property
    def unset(self) -> str | None:
        """What stands in a recipe where nothing is set. Where null means something else, it is `auto`."""
        return "auto" if self.kind is None and None in (self.default, *self.choices) else None

    def why_not(self, value: Any) -> str | None:
        """What was expected in place of a value; None where it will do."""
        if self.choices:
            allowed = ["null" if choice is None else str(choice) for choice in self.choices]
            return None if value in self.choices else f"{', '.join(allowed)} or {self.unset or 'null'}"
        if isinstance(self.default, bool):
            return None if isinstance(value, bool) else "true or false"
        if self.kind is not None:
            return None if value is None else replace(self, default=self.kind(), kind=None).why_not(value)
        if not isinstance(self.default, int | float):
            return None if self.default is None or isinstance(value, type(self.default)) else "what its default is"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "a number"
        if isinstance(self.default, int) and not isinstance(value, int):
            return "a whole number"
        low = -math.inf if self.minimum is None else self.minimum
        high = math.inf if self.maximum is None else self.maximum
        if low <= value <= high:
            return None
        if self.minimum is not None and self.maximum is not None:
            return f"{low:g} to {high:g}"
        return "a number" if low == -high else f"at least {low:g}" if self.maximum is None else f"at most {high:g}"


@dataclass(frozen=True, eq=False)
class MixerKind:
    """A kind of mixer.

    Attributes:
        title: its name for people.
        letter: in layer plans.
        modeling: its class, a `Mixer`, or where that is: "MODULE.CLASS", a module beside this one.
        options: what a recipe may set, by name.
        keep_attention: which layers keep attention unless a recipe says it.
        trans_points: whether each of its layers has a TransPoint that can be chosen.
        attention: whether it is attention, whatever the token: its TransPoint is infinity.
        check: takes all options; returns why they do not go together, or None.
    """

    title: str
    letter: str
    modeling: str | type
    options: dict[str, Option] = field(default_factory=dict)
    keep_attention: Any = "every:2"
    trans_points: bool = False
    attention: bool = False
    check: Callable[[dict], str | None] = lambda options: None

    def load(self) -> type[Any]:
        """The class."""
        if isinstance(self.modeling, type):
            return self.modeling
        module, name = self.modeling.split(".")
        return getattr(importlib.import_module(f".{module}", __package__), name)


def _convolution(options: dict) -> str | None:
    if options["conv_activation"] and not options["conv_kernel"]:
        return "student.conv_activation is 'silu' without a convolution; set student.conv_kernel, 1 to 4"
    return None


def _state_factor(options: dict) -> str | None:
    if options["state_factor"] > 1 and options["conv_kernel"] < 2:
        return "student.state_factor is 2 without a convolution over two tokens; set student.conv_kernel, 2 to 4"
    return None


def _selection(options: dict) -> str | None:
    if options["selection"] == "x" and options["rope"]:
        return "student.rope is true with student.selection=x, whose B and C are not of heads; set student.rope=false"
    return None


def _state_space(least: int, kernel: int, activation: str | None, gate: bool, norm: bool | None, rope: bool) -> dict:
    """The options of mixers with a state, with these defaults, and at least so many taps of the convolution; a norm of
    None is always there."""
    norms = {"norm": Option(norm, "whether the gated output is RMS-normalised, head by head")}
    return {
        "conv_kernel": Option(kernel, f"taps of the causal convolution over x, B and C, {least} to 4", least, 4),
        "conv_activation": Option(activation, "after the convolution: silu or null", choices=("silu", None)),
        "gate": Option(gate, "whether the output is gated by SiLU(z)"),
        **({} if norm is None else norms),
        "rope": Option(rope, "whether B and C take the teacher's rotary embedding (no native format has it)"),
        "qk_norm": Option(True, "whether B and C take the teacher's k/q norms, where it has them"),
    }


def _window(feature_map: str | None) -> dict:
    """The options of a window beside a state."""
    return {
        "window": Option(64, "how many last tokens attention sees", 1),
        "sinks": Option(4, "how many first tokens of a document attention sees, too", 0),
        "feature_map": Option(
            feature_map, "of keys and queries for the state: softmax (Hedgehog's) or null", choices=(None, "softmax")
        ),
        "window_drop": Option(0.0, "how often, in training, a layer goes without its window for a sequence", 0, 1),
    }


def _without_queries(options: dict) -> dict:
    """Without what is about B and C, which come from keys and queries."""
    return {name: option for name, option in options.items() if name not in ("rope", "qk_norm")}


def _pairs(options: dict) -> str | None:
    if options["modes"] == "lin" and options["state_size"] % 2:
        return f"student.state_size is {options['state_size']}, and modes of lin are pairs: set an even one"
    return None


MIXERS: dict[str, MixerKind] = {
    # As the native formats have it.
    "mamba2": MixerKind(
        "Mamba-2",
        "M",
        "mamba2.Mamba2Mixer",
        {
            **_state_space(least=1, kernel=4, activation="silu", gate=True, norm=True, rope=False),
            "gate_bias": Option(False, "whether the gate has a bias; false: none, as gguf has it"),
            "expand_kv": Option(False, "whether x and B have a head of their own for each query head"),
            "state_factor": Option(1, "size of the state, in sizes of a head: 1 or 2", choices=(1, 2)),
        },
        check=lambda options: _convolution(options) or _state_factor(options),
    ),
    # As near attention as it is.
    "transmamba": MixerKind(
        "TransMamba",
        "T",
        "modeling_transmamba.TransMambaMixer",
        _state_space(least=0, kernel=0, activation=None, gate=False, norm=False, rope=True),
        keep_attention=[],
        trans_points=True,
        check=_convolution,
    ),
    # As the native formats of gated DeltaNet have it.
    "gdn": MixerKind(
        "gated DeltaNet",
        "D",
        "gated_delta.GatedDeltaMixer",
        {
            **_state_space(least=1, kernel=4, activation="silu", gate=True, norm=None, rope=False),
            "gate_bias": Option(False, "whether gate and beta have a bias; false: none, as native has it"),
        },
        check=_convolution,
    ),
    # Without selection: what this is worth shows beside Mamba-2.
    "s4d": MixerKind(
        "S4D",
        "S",
        "modeling_s4d.S4DMixer",
        {
            **_without_queries(_state_space(least=1, kernel=4, activation="silu", gate=True, norm=True, rope=False)),
            "state_size": Option(64, "size of each channel's state, in real numbers", 1),
            "modes": Option("lin", "of S4D-Lin (lin: complex pairs) or S4D-Real (real)", choices=("lin", "real")),
        },
        check=lambda options: _convolution(options) or _pairs(options),
    ),
    # As the paper has it, and with `selection=x` as the native format has it.
    "mamba1": MixerKind(
        "Mamba-1",
        "1",
        "mamba1.Mamba1Mixer",
        {
            **_state_space(least=1, kernel=4, activation="silu", gate=True, norm=False, rope=False),
            "gate_bias": Option(False, "whether the gate has a bias"),
            "selection": Option(
                "hidden",
                "what step, B and C are computed from: hidden, as attention's keys and queries are, or x, the "
                "convolved x, as in the paper: these then start at random",
                choices=("hidden", "x"),
            ),
        },
        check=lambda options: _convolution(options) or _selection(options),
    ),
    "window_mamba2": MixerKind(
        "window + Mamba-2",
        "W",
        "window_mamba2.WindowMamba2Mixer",
        {**_window("softmax"), **_state_space(least=0, kernel=0, activation=None, gate=True, norm=True, rope=True)},
        check=_convolution,
    ),
    "window_gdn": MixerKind(
        "window + gated DeltaNet",
        "G",
        "window_gated_delta.WindowGatedDeltaMixer",
        {**_window(None), **_state_space(least=0, kernel=0, activation=None, gate=True, norm=None, rope=False)},
        check=_convolution,
    ),
    # The options are also of kept attention, which becomes this where one of them is set.
    "softmax": MixerKind(
        "softmax attention",
        "S",
        "softmax_attention.SoftmaxMixer",
        {
            "attention_window": Option(None, "how many last tokens kept attention sees", 1, kind=int),
            "attention_positions": Option(True, "whether kept attention takes the teacher's rotary embedding"),
            "attention_shared_rank": Option(
                None,
                "the layers of kept attention share their projections, with a LoRA of this rank in each; null: they "
                "do not",
                0,
                kind=int,
            ),
        },
        attention=True,
    ),
}


def is_attention(mixer: str) -> bool:
    """Whether layers of this name are attention, whatever the token: kept, or as a mixer."""
    return mixer == "attention" or (mixer in MIXERS and MIXERS[mixer].attention)


def names_with_trans_points() -> str:
    """For messages: the mixers that have TransPoints."""
    return " or ".join(name for name, kind in MIXERS.items() if kind.trans_points)


def have_trans_points(mixers: Iterable[str]) -> bool:
    """Whether layers of these kinds have TransPoints that can be chosen."""
    return any(mixer in MIXERS and MIXERS[mixer].trans_points for mixer in mixers)
