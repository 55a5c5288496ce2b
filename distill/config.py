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
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..students import StudentConfig, StudentError
from ..teachers import REGISTRY, is_hub_id
from .data import DataConfig


class ConfigError(ValueError):
    """A recipe that cannot be run. One line: the key, the value, what was expected."""


def setting(default: Any, help: str, **metadata) -> Any:
    """A dataclass field with its documentation; `metadata` may hold `choices`, `minimum`, `maximum`, `above`, `below`,
    and `path`: "read" (looked up beside its file), "teacher" (the same, or a name), or "written"."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class RunConfig:
    dir: str = setting("runs/default", "folder of the run: everything the recipe produces", path="written")
    seed: int = setting(0, "of data order and initialisation", minimum=0)
    device: str = setting("auto", "auto (a GPU where there is one), cpu or cuda", choices=("auto", "cpu", "cuda"))
    precision: str = setting(
        "auto",
        "of the matrix products in training: fp32, bf16, or auto (bf16 where the hardware multiplies it)",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = setting(
        True,
        "whether on a GPU layers are compiled in training, and passes recorded as CUDA graphs where each process has "
        "a whole copy of the student",
    )
    reuse: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders of other runs: a stage they have finished that depends on just the same is taken over",
            "path": "written",
        },
    )
    trackers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "where training figures go besides metrics.jsonl: tensorboard (files in RUN/tracking), wandb, "
            "trackio; each must be installed",
            "choices": ("tensorboard", "wandb", "trackio"),
        },
    )


@dataclass
class TeacherConfig:
    source: str = setting("smollm2-135m", "registry name, random-FAMILY, hub id, folder, or .gguf file", path="teacher")
    dtype: str = setting("float32", "of the teacher's weights", choices=("float32", "bfloat16", "float16"))
    training_dtype: str = setting(
        "auto",
        "of the teacher's weights while a stage trains; auto: bfloat16 on a GPU that multiplies in it (run.precision), "
        "else as dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    share: bool = setting(
        False,
        "whether, while a stage trains, each process holds a share of the teacher's layers only; they are then put "
        "together one by one",
    )
    trust_remote_code: bool = setting(False, "whether code that travels with the teacher may run")


@dataclass
class CalibrateConfig:
    sequences: int = setting(8, "training sequences the teacher's attention is measured on", minimum=1)
    decay: str = setting(
        "fit",
        "of each head: fit (what explains the teacher's head best) or lookback (its mean look-back)",
        choices=("fit", "lookback"),
    )


@dataclass
class TrainConfig:
    steps: int = setting(100, "optimizer steps", minimum=0)
    batch_size: int = setting(8, "sequences in a step, over all processes and accumulation", minimum=1)
    micro_batch_size: int | None = setting(
        None, "sequences in one forward pass of one process; null: the whole share of a step", minimum=1
    )
    lr: float = setting(1e-3, "learning rate of the mixers, at its highest", above=0)
    warmup: float = setting(0.05, "fraction of the steps in which the learning rate rises", minimum=0, maximum=1)
    final_lr: float = setting(0.1, "fraction of the learning rate left at the end of its cosine", minimum=0, maximum=1)
    weight_decay: float = setting(0.0, "of AdamW, on matrices only", minimum=0)
    betas: list[float] = field(
        default_factory=lambda: [0.9, 0.95], metadata={"help": "of AdamW", "length": 2, "minimum": 0, "maximum": 1}
    )
    clip: float = setting(1.0, "largest norm of the gradient", above=0)
    max_skipped: int = setting(
        10, "steps in a row that may be left out because their gradient is not finite, before training stops", minimum=1
    )
    log_every: int = setting(10, "steps between lines of metrics.jsonl", minimum=1)
    checkpoint_every: int = setting(100, "steps between checkpoints", minimum=1)
    keep_checkpoints: int = setting(2, "how many checkpoints to keep", minimum=1)


@dataclass
class AlignConfig(TrainConfig):
    pass


@dataclass
class AnnealConfig:
    fraction: float | None = setting(
        None,
        "of the steps, in which every TransPoint of a transmamba student falls from data.length, where it is the "
        "teacher, to its target; null: it is at its target from the first step on",
        above=0,
        maximum=1,
    )
    shape: str = setting(
        "log", "of the fall: linear, or log (by the same factor in each step)", choices=("linear", "log")
    )


@dataclass
class GroupConfig:
    lr: float | None = setting(
        None, "its highest learning rate; 0 leaves it frozen; null: lr for mixers, teacher_lr for the others", minimum=0
    )
    weight_decay: float | None = setting(None, "on its matrices; null: as the stage's", minimum=0)


@dataclass
class GroupsConfig:
    mixers: GroupConfig = field(default_factory=GroupConfig)
    attention: GroupConfig = field(default_factory=GroupConfig)
    mlp: GroupConfig = field(default_factory=GroupConfig)
    norms: GroupConfig = field(default_factory=GroupConfig)
    embeddings: GroupConfig = field(default_factory=GroupConfig)
    head: GroupConfig = field(default_factory=GroupConfig)
    other: GroupConfig = field(default_factory=GroupConfig)


@dataclass
class LoraSettings(GroupConfig):
    rank: int = setting(
        0, "of adapters (LoRA) on projections, which are merged when the stage ends; 0: none", minimum=0
    )
    alpha: float = setting(16.0, "what the adapters add is multiplied by alpha / rank", above=0)
    dropout: float = setting(0.0, "of the adapters' input", minimum=0, maximum=1)
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "projections that get adapters, by the last part of their names"},
    )
    lr: float | None = setting(1e-3, "highest learning rate of the adapters", above=0)


@dataclass
class DistillConfig(TrainConfig):
    lr: float = setting(5e-4, "learning rate of the mixers, at its highest", above=0)
    teacher_lr: float = setting(
        0.0, "learning rate of the parameters that were the teacher's; 0 leaves them frozen", minimum=0
    )
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    gradient_checkpointing: bool = setting(
        False, "whether layers are computed again in the backward pass: a third more time for far less memory"
    )
    divergence: str = setting(
        "forward",
        "between the distributions of the next token: forward KL(teacher || student), reverse, or jsd",
        choices=("forward", "reverse", "jsd"),
    )
    beta: float = setting(0.5, "the teacher's share of the mixture, for jsd", above=0, below=1)
    temperature: float = setting(1.0, "of both softmaxes in the divergence", above=0)
    ce_weight: float = setting(
        0.0, "of the cross-entropy on the text itself that is added, in nats per token of text", minimum=0
    )
    hidden_weight: float = setting(
        0.0, "of the hidden states' relative squared error that is added, a mean over layers", minimum=0
    )
    teacher_cache: str | None = setting(
        None,
        "folder of the teacher's cached predictions, read in its place; `transpoint cache-teacher` writes it",
        path="written",
    )
    anneal: AnnealConfig = field(default_factory=AnnealConfig)
    sample_schedules: list[Any] = field(
        default_factory=list,
        metadata={
            "help": "further schedules of a transmamba student, each as student.trans_points takes it: every step "
            "draws one of these and student.trans_points, all equally likely"
        },
    )


@dataclass
class CacheTeacherConfig:
    k: int = setting(64, "most likely tokens kept of each prediction; of the others, the mass", minimum=1)
    hidden: bool = setting(
        False,
        "whether the teacher's last hidden states are kept too: with its output matrix they give its whole predictions",
    )
    dtype: str = setting(
        "float16",
        "of log-probabilities and hidden states in the cache",
        choices=("float32", "bfloat16", "float16"),
    )
    batch_size: int = setting(8, "sequences in one forward pass of the teacher", minimum=1)
    shard_mb: int = setting(256, "megabytes in a shard, at most: an interrupted cache loses one at most", minimum=1)


@dataclass
class SynthesizeConfig:
    out: str | None = setting(None, "folder for the sampled text; null: synthetic, in the run folder", path="written")
    prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "sources of prompts, as in data.train; none: samples start from the beginning of text",
            "path": "read",
        },
    )
    chat: bool = setting(
        False,
        "whether texts are asked as questions; without prompts, whether the teacher writes questions and answers them",
    )
    samples: int = setting(1000, "how many; with fewer prompts, these come again in turn", minimum=1)
    max_prompt_tokens: int = setting(256, "of a text, which is cut, and of a chat, which is left out", minimum=1)
    max_new_tokens: int = setting(512, "of a sample", minimum=1)
    temperature: float = setting(1.0, "of sampling; 0 takes the most likely token", minimum=0)
    top_k: int = setting(0, "most likely tokens that are sampled from; 0: all", minimum=0)
    top_p: float = setting(1.0, "mass of the most likely tokens that are sampled from", above=0, maximum=1)
    batch_size: int = setting(16, "samples at a time", minimum=1)


@dataclass
class ExportConfig:
    format: str = setting(
        "native",
        "native (loads in plain transformers, vLLM, llama.cpp) or custom (any student; needs trust_remote_code)",
        choices=("native", "custom"),
    )
    dtype: str = setting("float32", "of the exported weights", choices=("float32", "bfloat16", "float16"))


@dataclass
class EvaluateConfig:
    sequences: int = setting(16, "held-out sequences that quality is measured on", minimum=1)
    prompts: list[str] = field(
        default_factory=lambda: ["What is the capital of France?"],
        metadata={"help": "chat questions that teacher and student answer"},
    )
    max_new_tokens: int = setting(40, "of each answer", minimum=1)
    schedules: list[Any] | None = setting(
        None,
        "schedules that a transmamba student is measured at, each as student.trans_points takes it, besides those it "
        "was trained on; null: teacher and mamba",
    )
    cost_length: int | None = setting(
        None, "tokens of context at which the cost of a schedule is measured; null: data.length", minimum=1
    )


@dataclass
class Recipe:
    """Everything a run depends on."""

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

    def training_dtype(self, on_gpu: bool) -> str:
        """What `teacher.training_dtype` comes to."""
        if self.teacher.training_dtype != "auto":
            return self.teacher.training_dtype
        return "bfloat16" if on_gpu and self.run.precision != "fp32" else self.teacher.dtype

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Writes it so that it can be run from any folder."""
        values, here = self.to_dict(), Path.cwd()
        _map_paths(
            values, Recipe, lambda value, use: os.path.abspath(value) if use == "written" else _beside(value, here, use)
        )
        path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key=value` overrides, checked.

    Raises:
        ConfigError: no such file, a key that does not exist (the nearest valid one is named), a value of the wrong
            type, or one that is impossible.
    """
    values = _read(Path(path), ())
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{override}' is no override; expected key=value, as in align.steps=100")
        try:
            nested, texts = (_load(value, loader) if value else None for loader in (_Loader, _TextLoader))
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: '{value}' is not a YAML value ({_one_line(error)})") from error
        for part in reversed(key.split(".")):
            nested, texts = {part: nested}, {part: texts}
        _check_keys(nested, Recipe, "")
        _as_written(nested, texts, Recipe)
        values = _merge(values, nested)
    _map_paths(values, Recipe, lambda value, _: _at_home(value))
    recipe = _typed(values)
    _check_values(recipe, "")
    try:
        recipe.student.check()
    except StudentError as error:
        raise ConfigError(str(error)) from error
    for stage in ("align", "distill"):
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
    if recipe.student.mixer != "transmamba":
        for key, value in (
            ("distill.anneal.fraction", recipe.distill.anneal.fraction),
            ("distill.sample_schedules", recipe.distill.sample_schedules or None),
            ("evaluate.schedules", recipe.evaluate.schedules),
        ):
            if value is not None:
                raise ConfigError(f"{key} is {value}; only student.mixer=transmamba has TransPoints to set")
    return recipe


def for_others(recipe: dict) -> dict:
    """A recipe, as `to_dict` gives it, for people elsewhere: of paths of this machine the last names alone."""

    def name(value: str, use: str) -> str:
        named = value.startswith("hub:") if use == "read" else use == "teacher" and _is_name(value)
        return value if named else os.path.basename(value.rstrip("/")) or value

    recipe = copy.deepcopy(recipe)
    _map_paths(recipe, Recipe, name)
    return recipe


def describe_keys() -> list[tuple[str, str, str]]:
    """(key, default, help) of every setting, in order."""

    def walk(kind: type, prefix: str) -> typing.Iterator[tuple[str, str, str]]:
        for entry in dataclasses.fields(kind):
            key = prefix + entry.name
            if dataclasses.is_dataclass(entry.type):
                yield from walk(entry.type, key + ".")
            else:
                default = entry.default_factory() if entry.default is dataclasses.MISSING else entry.default
                yield key, "null" if default is None else str(default), entry.metadata["help"]

    return list(walk(Recipe, ""))


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
    _check_keys(values, Recipe, "")
    _as_written(values, texts, Recipe)
    _map_paths(values, Recipe, lambda value, use: value if use == "written" else _beside(value, path.parent, use))
    merged: dict = {}
    for name in defaults:
        merged = _merge(merged, _read(path.parent / name, (*chain, path.resolve())))
    return _merge(merged, values)


def _check_keys(values: dict, kind: type, prefix: str) -> None:
    names = {entry.name: entry.type for entry in dataclasses.fields(kind)}
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


class _Loader(yaml.SafeLoader):
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
    values = yaml.load(text, loader)  # noqa: S506 - both are safe loaders
    try:
        json.dumps(values, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise yaml.YAMLError(f"it holds itself, or a key that is no text ({error})") from error
    return values


def _as_written(values: dict, texts: Any, kind: type) -> None:
    """Where a setting is text, takes what YAML has read as something else as it was written."""
    types = {entry.name: entry.type for entry in dataclasses.fields(kind)}
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


def _map_paths(values: dict, kind: type, change: Callable[[str, str], str]) -> None:
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
    return teacher in REGISTRY or teacher.startswith("random-") or is_hub_id(teacher)


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


def _typed(values: dict) -> Recipe:
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.create(_hidden(values)))
        assert isinstance(typed, DictConfig)
        return _shown(OmegaConf.to_object(typed))
    except OmegaConfBaseException as error:
        key, value = error.full_key or "?", values
        for part in str(key).replace("[", ".").replace("]", "").split("."):
            if isinstance(value, list) and part.isdigit():
                value = value[int(part)]
            elif isinstance(value, dict):
                value = value.get(part, "?")
        raise ConfigError(f"{key} is {value!r}; expected {_expected(str(key))}") from error


def _expected(key: str) -> str:
    kind: Any = Recipe
    for part in key.partition("[")[0].split("."):
        kind = next((entry.type for entry in dataclasses.fields(kind) if entry.name == part), None) if kind else None
    if kind is None:
        return "another type"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if typing.get_origin(kind) is list:
        return f"a list, each item {words.get(typing.get_args(kind)[0], 'of its type')}"
    return " or ".join(words.get(part, str(part)) for part in typing.get_args(kind) or (kind,))


def _check_values(section: Any, prefix: str) -> None:
    for entry in dataclasses.fields(section):
        key, value = prefix + entry.name, getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            _check_values(value, key + ".")
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
