"""What a comparison of architectures on tasks depends on: YAML onto typed dataclasses, checked before anything runs."""

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...students import StudentConfig
from ...students.modeling.errors import StudentError
from ..config import ConfigError, check_values
from ..settings import TrainConfig, setting
from .kinds import TASKS
from .task import Task


@dataclass
class TasksRunConfig:
    dir: str = setting("runs/tasks", "folder of all that is made")
    seed: int = setting(0, "the first of the seeds, of items and first weights", minimum=0)
    device: str = setting("auto", "auto (a GPU where there is one), cpu or cuda", choices=("auto", "cpu", "cuda"))


@dataclass
class TasksTrainConfig(TrainConfig):
    steps: int = setting(1000, "optimizer steps; a task may have its own", minimum=0)
    batch_size: int = setting(32, "items in a step", minimum=1)
    lrs: list[float] = field(
        default_factory=lambda: [3e-3],
        metadata={"help": "learning rates to try: that of the best validation with the first seed is kept", "above": 0},
    )
    weight_decay: float = setting(0.1, "of AdamW, on matrices only", minimum=0)


@dataclass
class MeasureConfig:
    items: int = setting(512, "items that a figure is measured on, others than those of training", minimum=1)


@dataclass
class TasksConfig:
    """Tasks by name: `task` (one of `TASKS`; unsaid, the name), settings of it, and `steps`. Architectures by name:
    settings of a student (`StudentConfig`), and `sizes` besides those that all have."""

    run: TasksRunConfig = field(default_factory=TasksRunConfig)
    family: str = setting("llama", "whose layers the models have", choices=("llama", "mistral", "qwen2", "qwen3"))
    sizes: dict[str, Any] = field(
        default_factory=lambda: {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        metadata={"help": "of all models: fields of the family's config"},
    )
    tasks: dict[str, Any] = field(default_factory=dict, metadata={"help": "what is to be learned"})
    architectures: dict[str, Any] = field(default_factory=dict, metadata={"help": "what is to learn it"})
    train: TasksTrainConfig = field(default_factory=TasksTrainConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)


@dataclass(frozen=True)
class Trial:
    """A task with its steps."""

    task: Task
    steps: int


@dataclass(frozen=True)
class Architecture:
    """A layer plan with the model's sizes."""

    student: StudentConfig
    sizes: dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """What is to be run: each task on each architecture."""

    config: TasksConfig
    tasks: dict[str, Trial]
    architectures: dict[str, Architecture]


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """The grid of a YAML file under `key=value` overrides, checked; one that sets a name to null leaves it out.

    Raises ConfigError, in one line, for a key, value, task or architecture that is none, or where nothing is to be run.
    """
    if not Path(path).is_file():
        raise ConfigError(f"no config file '{path}'")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"'{override}' is no override; expected key=value, as in train.steps=100")
    try:
        given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {_one_line(error)}") from error
    config = _typed(TasksConfig, given, "")
    check_values(config, "")
    config.run.dir = os.path.expanduser(config.run.dir)
    if not config.train.lrs:
        raise ConfigError("train.lrs is empty: name at least one learning rate")
    tasks = {name: _trial(name, values, config) for name, values in _named(config.tasks, "tasks")}
    architectures = {
        name: _architecture(name, values, config) for name, values in _named(config.architectures, "architectures")
    }
    for section, found in (("tasks", tasks), ("architectures", architectures)):
        if not found:
            raise ConfigError(f"{section} names none: there is nothing to run")
    return Grid(config, tasks, architectures)


def _named(section: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for name, values in section.items():
        if values is None:
            continue
        if not re.fullmatch(r"\w[\w.+-]*", str(name)):
            raise ConfigError(f"{key}: '{name}' cannot name a folder: take letters, digits, and . _ + -")
        if not isinstance(values, dict):
            raise ConfigError(f"{key}.{name} is {values!r}; expected settings, as {{}}")
        found.append((str(name), dict(values)))
    return found


def _trial(name: str, values: dict[str, Any], config: TasksConfig) -> Trial:
    kind, steps = values.pop("task", name), values.pop("steps", config.train.steps)
    if kind not in TASKS:
        raise ConfigError(f"tasks.{name}: no task '{kind}'; expected one of {', '.join(TASKS)}" + _near(kind, TASKS))
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ConfigError(f"tasks.{name}.steps is {steps!r}; expected a whole number of at least 0")
    task = _typed(TASKS[kind], OmegaConf.create(values), f"tasks.{name}.")
    check_values(task, f"tasks.{name}.")
    if reason := task.why_not():
        raise ConfigError(f"tasks.{name}: {reason}")
    return Trial(task, steps)


def _architecture(name: str, values: dict[str, Any], config: TasksConfig) -> Architecture:
    sizes = values.pop("sizes", {})
    known = [entry.name for entry in dataclasses.fields(StudentConfig.with_options())]
    for key in values:
        if key not in known:
            raise ConfigError(f"architectures.{name}: no setting '{key}' of a student{_near(key, known)}")
    if not isinstance(sizes, dict):
        raise ConfigError(f"architectures.{name}.sizes is {sizes!r}; expected fields of the family's config")
    student = StudentConfig(**values)
    try:
        student.check()
    except StudentError as error:
        raise ConfigError(f"architectures.{name}: {error}") from error
    return Architecture(student, {**config.sizes, **sizes})


def _typed(schema: type, given: Any, prefix: str) -> Any:
    """A dataclass of what was given."""
    known = [entry.name for entry in dataclasses.fields(schema)]
    if not isinstance(given, DictConfig):
        raise ConfigError("the file holds a list; expected keys and values")
    for key in map(str, given):
        if key not in known:
            near = _near(key, known) or f"; expected one of {', '.join(known)}"
            raise ConfigError(f"unknown key '{prefix}{key}'{near}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{prefix}{error.full_key or ''}: {_one_line(error)}") from error


def _near(name: str, known: Sequence[str] | dict) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
