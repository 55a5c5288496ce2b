"""A recipe: YAML onto typed dataclasses, checked before anything loads.

`load_recipe("configs/tiny.yaml", ["align.steps=10"])`. A file may begin with `defaults: [other.yaml, ...]`, files it
builds on, in order. A relative path in a file is looked up beside that file first, one on the command line in the
current directory; what is written (`run.dir`) is relative to the current directory in any case. `~` is the home folder.
Text is taken as it is written: `2024`, `yes` and `${x}` are no numbers, answers or references where text is wanted.
`Recipe` below documents every key; `transpoint keys` prints them.
"""

import copy
import dataclasses
import difflib
import glob
import json
import math
import os
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..students.config import StudentConfig
from ..students.modeling.configuration_mixers import names_with_trans_points
from ..students.modeling.errors import StudentError
from ..teachers.names import REGISTRY, SCRATCH, is_hub_id, is_scratch
from .errors import DistillError
from .settings import (
    AlignConfig,
    CacheTeacherConfig,
    CalibrateConfig,
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    RunConfig,
    SynthesizeConfig,
    TeacherConfig,
)
from .stages.pipeline import PIPELINE
from .stages.train import TRAIN

__all__ = [
    "AlignConfig",
    "CacheTeacherConfig",
    "CalibrateConfig",
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "Recipe",
    "RunConfig",
    "SynthesizeConfig",
    "TeacherConfig",
    "describe_keys",
    "for_others",
    "load_recipe",
]


class ConfigError(DistillError, ValueError):
    """A recipe that cannot be run. One line: the key, the value, what was expected."""


@dataclass
class Recipe:
    """Everything a run depends on: besides these sections, one of each further stage that has settings."""

    run: RunConfig = field(default_factory=RunConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    cache_teacher: CacheTeacherConfig = field(default_factory=CacheTeacherConfig)
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls.schema() if cls is Recipe else cls)

    @classmethod
    def schema(cls) -> type["Recipe"]:
        """The class that this is, for the mixers and stages there are now: what `Recipe()` makes."""
        student = StudentConfig.with_options()
        stages = {stage.name: stage.settings for stage in PIPELINE if stage.settings is not None}
        more = {"student": student} | {name: kind for name, kind in stages.items() if name not in cls.__annotations__}
        return _extended(tuple(more.items()))

    @property
    def from_scratch(self) -> bool:
        """Whether there is no teacher."""
        return is_scratch(self.teacher.source)

    def length_in(self, stage: str) -> int:
        """Tokens of a sequence that a stage trains on."""
        return getattr(self, stage).length or self.data.length

    def training_dtype(self, precision: str) -> str:
        """What `teacher.training_dtype` comes to where products are taken in a precision, bf16 or fp32."""
        if self.teacher.training_dtype != "auto":
            return self.teacher.training_dtype
        return "bfloat16" if precision == "bf16" else self.teacher.dtype

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Writes it so that it can be run from any folder."""
        values, here = self.to_dict(), Path.cwd()
        _map_paths(
            values,
            Recipe.schema(),
            lambda value, use: os.path.abspath(value) if use == "written" else _beside(value, here, use),
        )
        path.write_text(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


@lru_cache
def _extended(sections: tuple[tuple[str, type], ...]) -> type[Recipe]:
    fields = [(name, kind, field(default_factory=kind)) for name, kind in sections]
    made = dataclasses.make_dataclass(Recipe.__name__, fields, bases=(Recipe,))
    made.__module__, made.__doc__ = __name__, Recipe.__doc__
    return made


def load_recipe(
    path: str | Path | None, overrides: typing.Sequence[str] = (), base: str | Path | None = None
) -> Recipe:
    """The recipe in a YAML file (None: one that says nothing) on top of that in `base`, with `key=value` overrides,
    checked.

    Raises:
        ConfigError: no such file, a key that does not exist (the nearest valid one is named), a value of the wrong
            type, or one that is impossible.
    """
    files = [Path(file) for file in (base, path) if file is not None]
    values: dict = reduce(_merge, (_read(file, ()) for file in files), {})
    nested: Any  # values, and as they are written
    texts: Any
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{override}' is no override; expected key=value, as in align.steps=100")
        try:
            nested, texts = (_load(text, loader) if text else None for loader in (_Loader, _TextLoader))
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: '{text}' is not a YAML value ({_one_line(error)})") from error
        for part in reversed(key.split(".")):
            nested, texts = {part: nested}, {part: texts}
        _check_keys(nested, Recipe.schema(), "")
        _as_written(nested, texts, Recipe.schema())
        values = _merge(values, nested)
    _map_paths(values, Recipe.schema(), lambda value, _: _at_home(value))
    recipe = _typed(values)
    check_values(recipe, "")
    try:
        recipe.student.check()
    except StudentError as error:
        raise ConfigError(str(error)) from error
    for stage in [stage.name for stage in PIPELINE if stage.trains]:
        batch, micro = getattr(recipe, stage).batch_size, getattr(recipe, stage).micro_batch_size
        if micro is not None and batch % micro:
            raise ConfigError(f"{stage}.micro_batch_size is {micro}; expected a divisor of {stage}.batch_size, {batch}")
    if recipe.data.streaming:
        for key, value, reason in (
            ("data.max_train_tokens", recipe.data.max_train_tokens, "steps say how much is read"),
            ("distill.teacher_cache", recipe.distill.teacher_cache, "a cache holds predictions on text of fixed size"),
        ):
            if value is not None:
                raise ConfigError(f"{key} is {value}; expected null with data.streaming=true: {reason}")
    if recipe.teacher.revision is not None and not is_hub_id(recipe.teacher.source):
        raise ConfigError(
            f"teacher.revision is '{recipe.teacher.revision}'; expected null: teacher.source '{recipe.teacher.source}' "
            "is not from the hub"
        )
    if recipe.teacher.sizes and not recipe.teacher.source.startswith(("random-", SCRATCH)):
        raise ConfigError(
            f"teacher.sizes is {recipe.teacher.sizes}; expected none: teacher.source '{recipe.teacher.source}' has "
            "sizes of its own"
        )
    if not recipe.from_scratch and TRAIN.of(recipe) != TRAIN.of(Recipe()):
        raise ConfigError(
            f"train has settings, and trains models from scratch alone (teacher.source={SCRATCH}llama): students of "
            f"'{recipe.teacher.source}' are trained by align and distill"
        )
    for one in PIPELINE if recipe.from_scratch else ():
        if one.needs_teacher and one.wanted(recipe) and not one.wanted(Recipe()):
            raise ConfigError(
                f"teacher.source '{recipe.teacher.source}' is an untrained model, and the stage {one.name}, which "
                "this recipe asks for, takes something from a teacher: leave it out"
            )
    if not recipe.student.kind.trans_points:
        who = names_with_trans_points()
        for key, asked in (
            ("distill.anneal.fraction", recipe.distill.anneal.fraction),
            ("distill.sample_schedules", recipe.distill.sample_schedules or None),
            ("evaluate.schedules", recipe.evaluate.schedules),
        ):
            if asked is not None:
                raise ConfigError(f"{key} is {asked}; only student.mixer={who} has TransPoints to set")
    return recipe


def for_others(recipe: dict) -> dict:
    """A recipe, as `to_dict` gives it, for people elsewhere: of paths of this machine the last names alone."""

    def name(value: str, use: str) -> str:
        named = value.startswith("hub:") if use == "read" else use == "teacher" and _is_name(value)
        return value if named else os.path.basename(value.rstrip("/")) or value

    recipe = copy.deepcopy(recipe)
    _map_paths(recipe, Recipe.schema(), name)
    return recipe


def describe_keys() -> list[tuple[str, str, str]]:
    """(key, default, help) of every setting, in order."""

    def walk(kind: Any, prefix: str) -> typing.Iterator[tuple[str, str, str]]:
        for entry in dataclasses.fields(kind):
            key = prefix + entry.name
            if dataclasses.is_dataclass(entry.type):
                yield from walk(entry.type, key + ".")
            else:
                default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
                yield key, "null" if default is None else str(default), entry.metadata["help"]

    return list(walk(Recipe.schema(), ""))


def _read(path: Path, chain: tuple[Path, ...]) -> dict:
    """The values of a file on top of those of its defaults, its paths made absolute."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise ConfigError(f"no config file '{path}'" + (f"; did you mean '{path.with_name(near[0])}'?" if near else ""))
    if path.resolve() in chain:
        raise ConfigError(f"{path}: its defaults lead back to itself")
    try:
        values, texts = (_load(path.read_text(encoding="utf-8"), loader) for loader in (_Loader, _TextLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {_one_line(error)}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected keys and values")
    defaults = values.pop("defaults", None) or []
    if not (isinstance(defaults, list) and all(isinstance(name, str) for name in defaults)):
        raise ConfigError(f"{path}: defaults is {defaults!r}; expected a list of files")
    _check_keys(values, Recipe.schema(), "")
    _as_written(values, texts, Recipe.schema())
    _map_paths(
        values, Recipe.schema(), lambda value, use: value if use == "written" else _beside(value, path.parent, use)
    )
    merged: dict = {}
    for name in defaults:
        merged = _merge(merged, _read(path.parent / name, (*chain, path.resolve())))
    return _merge(merged, values)


def _check_keys(values: dict, kind: type, prefix: str) -> None:
    names: dict[str, Any] = {entry.name: entry.type for entry in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in names:
            every = [known for known, _, _ in describe_keys()]
            near = difflib.get_close_matches(
                prefix + str(key), [*every, *(prefix + name for name in names)], n=1, cutoff=0.5
            )
            hint = f"; did you mean '{near[0]}'?" if near else f"; expected one of {', '.join(names)}"
            raise ConfigError(f"unknown key '{prefix}{key}' (value {value!r}){hint}")
        if dataclasses.is_dataclass(names[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}{key} is {value!r}; expected a section with keys of its own")
            _check_keys(value, names[key], f"{prefix}{key}.")


def _merge(low: dict, high: dict) -> dict:
    both = {key: _merge(low[key], high[key]) for key in low.keys() & high.keys() if isinstance(low[key], dict)}
    return {**low, **high, **both}


# libyaml's, where there is one: several times as fast.
SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Loader(SafeLoader):
    """YAML in which a key stands once, and a number is what a person takes for one: 1e-3 is, 012 is twelve, and times
    and dates are none."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node):
        return int(self.construct_scalar(node).replace("_", ""))

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if key.tag != "tag:yaml.org,2002:merge" and name in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"the key '{name}' stands twice, again in line {line}: remove one of them")
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_NUMBER = list("-+.0123456789")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9][0-9_]*$"), _NUMBER)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
        r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
    ),
    _NUMBER,
)


class _TextLoader(_Loader):
    """The same with every scalar as the text that stands there, but null."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for letter, resolvers in _Loader.yaml_implicit_resolvers.items()
    }


def _load(text: str, loader: type[yaml.SafeLoader]) -> Any:
    try:
        values = yaml.load(text, loader)  # noqa: S506 - both are safe loaders
    except UnicodeEncodeError as error:  # of libyaml, which takes UTF-8
        raise yaml.YAMLError("it is no Unicode text") from error
    try:
        json.dumps(values, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise yaml.YAMLError(f"it holds itself, or a key that is no text ({error})") from error
    return values


def _as_written(values: dict, texts: Any, kind: type) -> None:
    """Where a setting is text, takes what YAML has read as something else as it was written."""
    types: dict[str, Any] = {entry.name: entry.type for entry in dataclasses.fields(kind)}
    for key, value in values.items():
        written = texts[key]
        if dataclasses.is_dataclass(types[key]):
            _as_written(value, written, types[key])
        elif types[key] in (str, str | None) and _is_scalar(value):
            values[key] = written
        elif types[key] in (int, int | None) and isinstance(value, float) and value.is_integer():
            values[key] = int(value)  # 1e3
        elif types[key] == list[str] and isinstance(value, list):
            values[key] = [text if _is_scalar(one) else one for one, text in zip(value, written, strict=True)]


def _is_scalar(value: Any) -> bool:
    return value is not None and not isinstance(value, list | dict)


def _map_paths(values: dict, kind: Any, change: Callable[[str, str], str]) -> None:
    """Changes every path among the values, in place: `change` gets it, and whether it is read or written."""
    for entry in dataclasses.fields(kind):
        value = values.get(entry.name)
        if dataclasses.is_dataclass(entry.type) and isinstance(value, dict):
            _map_paths(value, entry.type, change)
        elif "path" in entry.metadata and isinstance(value, str):
            values[entry.name] = change(value, entry.metadata["path"])
        elif "path" in entry.metadata and isinstance(value, list):
            use = entry.metadata["path"]
            values[entry.name] = [change(one, use) if isinstance(one, str) else one for one in value]


def _is_name(teacher: str) -> bool:
    """Whether a teacher is named, and no path."""
    return teacher in REGISTRY or teacher.startswith(("random-", SCRATCH)) or is_hub_id(teacher)


def _at_home(path: str) -> str:
    expanded = os.path.expanduser(path)
    if not path or expanded.startswith("~"):
        raise ConfigError(f"'{path}' is no path: " + ("there is no such user" if path else "leave it out, or name one"))
    return expanded


def _beside(source: str, folder: Path, use: str) -> str:
    """A path, or a pattern, of what lies in this folder, made absolute; anything else as it is."""
    if not source or (_is_name(source) if use == "teacher" else source.startswith("hub:")):
        return source
    if os.path.exists(folder / source):
        return str((folder / source).resolve())
    pattern = os.path.join(glob.escape(str(folder.resolve())), source)
    return pattern if glob.glob(pattern, recursive=True) else source


# OmegaConf reads `${x}` as a reference and `???` as a value that is missing: neither is anything here.
def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _hidden(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_hidden(one) for one in value]
    if isinstance(value, str):
        if "\0" in value:
            raise ConfigError(f"{value!r} holds a NUL character: take it out")
        return "\0???" if value == "???" else value.replace("${", "$\0{")
    return value


def _shown(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        for entry in dataclasses.fields(value):
            setattr(value, entry.name, _shown(getattr(value, entry.name)))
        return value
    if isinstance(value, dict):
        return {key: _shown(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_shown(one) for one in value]
    return value.replace("\0", "") if isinstance(value, str) else value


@dataclass(frozen=True)
class _Given:
    """Some values of a section, which are the same as others that are written alike."""

    written: str
    values: dict = field(compare=False)


@lru_cache(maxsize=256)
def _converted(kind: type, given: _Given) -> Any:
    """A section from what is given of it. Only to be copied."""
    typed = OmegaConf.merge(_structured(kind), OmegaConf.create(given.values))
    assert isinstance(typed, DictConfig)
    return _shown(OmegaConf.to_object(typed))


@lru_cache
def _structured(kind: type) -> DictConfig:
    """The defaults as OmegaConf has them."""
    return OmegaConf.structured(kind)


def _typed(values: dict) -> Recipe:
    """OmegaConf is slow, and most of what a recipe says is the default, or is read again: it converts what is not."""
    kind: Any = Recipe.schema()  # mypy takes a class for an instance
    recipe = copy.deepcopy(_converted(kind, _Given("", {})))
    for name, given in _hidden(values).items():
        section = getattr(recipe, name)
        kind = type(section)
        changed = {key: value for key, value in given.items() if repr(value) != repr(getattr(section, key))}
        try:
            if changed:
                setattr(recipe, name, copy.deepcopy(_converted(kind, _Given(repr(changed), changed))))
        except OmegaConfBaseException as error:
            key, value = f"{name}.{error.full_key or '?'}", values
            for part in key.replace("[", ".").replace("]", "").split("."):
                if isinstance(value, list) and part.isdigit():
                    value = value[int(part)]
                elif isinstance(value, dict):
                    value = value.get(part, "?")
            raise ConfigError(f"{key} is {value!r}; expected {_expected(key)}") from error
    return recipe


def _expected(key: str) -> str:
    kind: Any = Recipe.schema()
    for part in key.partition("[")[0].split("."):
        kind = next((entry.type for entry in dataclasses.fields(kind) if entry.name == part), None) if kind else None
    if kind is None:
        return "another type"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if typing.get_origin(kind) is list:
        return f"a list, each item {words.get(typing.get_args(kind)[0], 'of its type')}"
    return " or ".join(words.get(part, str(part)) for part in typing.get_args(kind) or (kind,))


def check_values(section: Any, prefix: str) -> None:
    """Raises ConfigError where a setting, or one of a section in it, is not what its `settings.setting` allows."""
    for entry in dataclasses.fields(section):
        key, value = prefix + entry.name, getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            check_values(value, key + ".")
            continue
        limits = entry.metadata
        for choice in (value if isinstance(value, list) else [value]) if "choices" in limits else ():
            if choice not in limits["choices"]:
                near = difflib.get_close_matches(str(choice), limits["choices"], n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                verb = "holds" if isinstance(value, list) else "is"
                raise ConfigError(f"{key} {verb} '{choice}'; expected one of {', '.join(limits['choices'])}{hint}")
        if "length" in limits and len(value) != limits["length"]:
            raise ConfigError(f"{key} is {value}; expected {limits['length']} numbers")
        for number in value if isinstance(value, list) else [value]:
            if entry.type in (list[str], list[float]) and isinstance(number, list | dict):  # OmegaConf lets it pass
                raise ConfigError(f"{key} holds {number!r}; expected {_expected(key)}")
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if math.isinf(number) and entry.type not in (Any, list[Any], list[Any] | None):
                raise ConfigError(f"{key} is {number}; expected a finite number")
            if "minimum" in limits and not number >= limits["minimum"]:
                raise ConfigError(f"{key} is {number}; expected at least {limits['minimum']}")
            if "maximum" in limits and not number <= limits["maximum"]:
                raise ConfigError(f"{key} is {number}; expected at most {limits['maximum']}")
            if "above" in limits and not number > limits["above"]:
                raise ConfigError(f"{key} is {number}; expected more than {limits['above']}")
            if "below" in limits and not number < limits["below"]:
                raise ConfigError(f"{key} is {number}; expected less than {limits['below']}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
