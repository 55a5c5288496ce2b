"""What a recipe says of the student."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from .modeling.configuration_mixers import MIXERS, MixerKind, have_trans_points
from .modeling.configuration_transmamba import SCHEDULES, parse_trans_points
from .modeling.errors import StudentError
from .plans import PLANS, Plan

SOFTMAX = "softmax"  # what kept attention becomes where something of it is set


@dataclass
class StudentConfig:
    """Which layers become mixers, and what is set of these: besides these fields, the options of every mixer there is
    (`MIXERS`), each as `Option.unset` where the mixer's own default holds."""

    mixer: str = field(default="mamba2", metadata={"help": f"what replaces attention: {' or '.join(MIXERS)}"})
    keep_attention: Any = field(
        default=None,
        metadata={
            "help": "layers that keep attention: a list of indices (negative ones from the end), 'every:N' (the last "
            "layer of every N), a fraction of the layers, evenly spaced, or 'select:K' (K layers, or such a fraction, "
            "chosen by select); null: every:2 for mamba2, none for transmamba"
        },
    )
    trans_points: Any = field(
        default="paper-v9",
        metadata={
            "help": "transmamba: up to which token each layer takes attention: a number, inf, a list with one for each "
            f"layer, or a schedule: {', '.join(SCHEDULES)}"
        },
    )

    plan: str | None = field(
        default=None,
        metadata={
            "help": "which layers keep attention, and what becomes of it, as in a published hybrid: "
            f"{', '.join(PLANS)}; null: keep_attention says it"
        },
    )

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls.with_options() if cls is StudentConfig else cls)

    def __reduce__(self):
        return _remade, (vars(self),)

    @classmethod
    def with_options(cls) -> type["StudentConfig"]:
        """The class that this is, for the mixers there are now: what `StudentConfig(...)` makes."""
        return _with_options(tuple(MIXERS.items()))

    @property
    def kind(self) -> MixerKind:
        """The mixer's. Raises StudentError where there is no such mixer."""
        if self.mixer not in MIXERS:
            raise StudentError(f"student.mixer is '{self.mixer}'; expected one of {', '.join(MIXERS)}")
        return MIXERS[self.mixer]

    @property
    def named_plan(self) -> Plan | None:
        """That of a published hybrid. Raises StudentError where there is none of this name."""
        if self.plan is not None and self.plan not in PLANS:
            raise StudentError(f"student.plan is '{self.plan}'; expected one of {', '.join(PLANS)}, or null")
        return None if self.plan is None else PLANS[self.plan]

    @property
    def attention_options(self) -> dict[str, Any] | None:
        """The options of the softmax attention that kept attention becomes; None where it stays as it is."""
        if self.mixer == SOFTMAX:  # they are the mixer's
            return None
        plan = self.named_plan
        options, given = MIXERS[SOFTMAX].options, (plan.attention if plan else {}) | self._given()
        found = {name: given.get(name, option.default) for name, option in options.items()}
        return found if any(found[name] != option.default for name, option in options.items()) else None

    @property
    def mixer_options(self) -> dict[str, Any]:
        """Keyword arguments of the mixer's class: its options, set or by default."""
        options, given = self.kind.options, self._given()
        return {name: given.get(name, option.default) for name, option in options.items()}

    def check(self) -> None:
        """Raises StudentError for a value that no student can have, whatever the teacher."""
        kind, options = self.kind, self.mixer_options
        known, of_attention = kind.options | MIXERS[SOFTMAX].options, self.attention_options or {}
        for name, value in (options | of_attention).items():
            if expected := known[name].why_not(value):
                raise StudentError(f"student.{name} is {_quoted(value)}; expected {expected}")
        if reason := kind.check(options):
            raise StudentError(reason)
        for name, value in self._others().items():
            raise StudentError(
                f"student.{name} is {_quoted(value)}, and a {self.mixer} mixer has no such option: it has "
                f"{', '.join(kind.options) or 'none'}"
            )
        keep = self.resolved().keep_attention
        if self.named_plan is not None:
            self._check_plan(self.named_plan)
        else:
            kept_layers(keep, None)
        if of_attention and not isinstance(keep, str) and keep in ([], (), 0):
            name, value = next((name, value) for name, value in self._given().items() if name in of_attention)
            raise StudentError(
                f"student.{name} is {_quoted(value)}, and no layer keeps attention: name some in student.keep_attention"
            )
        if kind.trans_points:
            points = self.trans_points
            parse_trans_points(points, len(points) if isinstance(points, list | tuple) else 1, longest=1)

    def _check_plan(self, plan: Plan) -> None:
        if self.keep_attention is not None:
            raise StudentError(
                f"student.keep_attention is {_quoted(self.keep_attention)}, and student.plan={self.plan} says which "
                "layers keep attention: set one of them to null"
            )
        if plan.attention and self.mixer == SOFTMAX:
            raise StudentError(
                f"student.mixer is {SOFTMAX}, which is what student.plan={self.plan} makes of kept attention: name "
                "another mixer"
            )

    def resolved(self) -> "StudentConfig":
        """The same with the mixer's own defaults for what is not set. Raises StudentError for an unknown mixer."""
        keep = self.kind.keep_attention if self.keep_attention is None and self.plan is None else self.keep_attention
        return dataclasses.replace(self, keep_attention=keep, **self.mixer_options)

    def facts(self) -> dict[str, Any]:
        """What of it makes a difference to the student, by name."""
        kept = {"keep_attention": self.resolved().keep_attention} if self.plan is None else {"plan": self.plan}
        own = {"mixer": self.mixer, **kept, **self.mixer_options}
        own |= self.attention_options or {}
        return own | ({"trans_points": self.trans_points} if have_trans_points([self.mixer]) else {})

    def without_attention(self) -> "StudentConfig":
        """The same with a mixer in every layer."""
        unset: dict[str, Any] = {name: None for name in MIXERS[SOFTMAX].options if self.mixer != SOFTMAX}
        return dataclasses.replace(self, keep_attention=[], plan=None, **unset)

    def _others(self) -> dict[str, Any]:
        """Options of other mixers that are set to something."""
        found, own = {}, self.kind.options | MIXERS[SOFTMAX].options
        for name, value in sorted(self._given().items()):
            of = [kind.options[name] for kind in MIXERS.values() if name in kind.options]
            if name not in own and any(value != option.default for option in of):
                found[name] = value
        return found

    def _given(self) -> dict[str, Any]:
        """Options of any mixer that are not as they stand where nothing is set."""
        options = [one for one in dataclasses.fields(self) if one.name not in StudentConfig.__dataclass_fields__]
        return {one.name: value for one in options if (value := getattr(self, one.name)) != one.default}


def _remade(values: dict) -> StudentConfig:
    return StudentConfig(**values)


def _quoted(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


@lru_cache
def _with_options(mixers: tuple[tuple[str, MixerKind], ...]) -> type[StudentConfig]:
    """One field for each option of any mixer."""
    by_name: dict[str, dict[str, Any]] = {}
    for mixer, kind in mixers:
        for name, option in kind.options.items():
            by_name.setdefault(name, {})[mixer] = option
    fields = []
    for name, options in by_name.items():
        first = next(iter(options.values()))
        kinds = {str if option.unset else option.kind or type(option.default) for option in options.values()}
        hint: Any = kinds.pop() if len(kinds) == 1 else Any
        defaults = ", ".join(f"{_shown(option.default)} for {mixer}" for mixer, option in options.items())
        unset = next((option.unset for option in options.values() if option.unset), None)
        default = field(default=unset, metadata={"help": f"{first.help}; {unset or 'null'}: {defaults}"})
        fields.append((name, hint if hint is Any else hint | None, default))
    made = dataclasses.make_dataclass(StudentConfig.__name__, fields, bases=(StudentConfig,))
    made.__module__, made.__doc__ = __name__, StudentConfig.__doc__
    return made


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)


def layer_plan(config: StudentConfig, num_layers: int, from_scratch: bool = False) -> list[str]:
    """The mixer of each layer; where attention is kept "attention", or "softmax" where an option of it is set.

    Args:
        from_scratch: whether there is no teacher; then every layer may be attention.

    Raises:
        StudentError: `keep_attention` names a layer that is not there, is malformed, or keeps every layer of a teacher;
            or the plan takes more layers.
    """
    keep, plan = config.resolved().keep_attention, config.named_plan
    if plan is not None and num_layers < plan.least:
        of = "there are" if from_scratch else "the teacher has"
        raise StudentError(
            f"student.plan is {config.plan}, which takes {plan.least} layers or more, and {of} {num_layers}"
        )
    kept = kept_layers(keep, num_layers) if plan is None else set(plan.kept(num_layers))
    if len(kept) == num_layers and not from_scratch:
        raise StudentError(
            f"student.keep_attention is {keep!r}: all {num_layers} layers keep attention, "
            "so there is nothing to convert"
        )
    attention = "attention" if config.attention_options is None else SOFTMAX
    return [attention if layer in kept else config.mixer for layer in range(num_layers)]


def asks_to_select(keep: Any) -> bool:
    """Whether `keep_attention` leaves the choice to the stage `select`."""
    return isinstance(keep, str) and keep.startswith("select:")


def count_to_select(keep: Any, num_layers: int) -> int | None:
    """How many of `num_layers` are to be chosen; None where they are not left to the stage `select`.

    Raises StudentError where as many are asked for as there are, or more.
    """
    if not asks_to_select(keep):
        return None
    number = keep.partition(":")[2]
    count = int(number) if number.isdigit() else round(float(number) * num_layers)
    if count >= num_layers:
        raise StudentError(
            f"student.keep_attention is '{keep}': of the teacher's {num_layers} layers at least one is to be converted"
        )
    return count


_KEEP = "student.keep_attention"


def kept_layers(keep: Any, num_layers: int | None, setting: str = _KEEP) -> set[int]:
    """Indices that `keep_attention`, or another setting, says of `num_layers` (None: only its form is checked)."""
    expected = "expected a list of layer indices, 'every:N' with N of at least 2, "
    expected += "a fraction from 0 to 1, or 'select:K'" if setting == _KEEP else "or a fraction from 0 to 1"
    if isinstance(keep, str):
        word, _, number = keep.partition(":")
        if word == "select" and setting == _KEEP and (number.isdigit() or _is_fraction(number)):
            if num_layers is None:
                return set()
            raise StudentError(f"{_KEEP} is '{keep}': no layers have been chosen; run the stage select")
        if word != "every" or not number.isdigit() or int(number) < 2:
            raise StudentError(f"{setting} is '{keep}'; {expected}")
        return set(range(int(number) - 1, num_layers or 0, int(number)))
    if isinstance(keep, int | float) and not isinstance(keep, bool):
        if not 0 <= keep <= 1:
            raise StudentError(f"{setting} is {keep}; {expected}")
        layers = num_layers or 0
        count = round(keep * layers)
        # The middle of each of `count` equal parts.
        return {int((i + 0.5) * layers / count) for i in range(count)}
    if not hasattr(keep, "__iter__") or isinstance(keep, Mapping):
        raise StudentError(f"{setting} is {keep!r}; {expected}")
    kept = set()
    for layer in keep:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise StudentError(f"{setting} holds {layer!r}; {expected}")
        if num_layers is not None and not -num_layers <= layer < num_layers:
            raise StudentError(f"{setting} holds layer {layer}, the teacher has 0 to {num_layers - 1}")
        kept.add(layer % num_layers if num_layers else layer)
    return kept


def _is_fraction(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
