"""Runs a grid: each task on each architecture, with each seed, in folders of their own. What is done is not done again,
and what was interrupted goes on.

    DIR/tasks.json                            what has come of it so far
    DIR/TASK-ARCHITECTURE-lrLR-seedSEED/      of each training: stage.json, metrics.jsonl, checkpoints, done.json
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console

from ...students import HybridForCausalLM, untrained
from ...students.modeling.configuration_mixers import is_attention
from ..config import Recipe, RunConfig
from ..console import console_of
from ..data.packed import collate
from ..errors import RunError
from ..run.files import write_json
from ..run.folder import StageFolder, alone_in
from ..settings import resultless
from ..stages.processes import make_accelerator
from ..train.groups import ParameterGroup
from ..train.trainer import Stopped, TrainingError, train
from .config import Architecture, Grid, TasksTrainConfig
from .objectives import Answering
from .task import TEST, VALIDATION, Generated, Task


@dataclass(frozen=True)
class Outcome:
    """What came of a task, an architecture and a seed, at the learning rate that was kept.

    Attributes:
        value: of the task's figure, on test items.
        parts: the same of what is measured besides, by name.
        state_bytes: that the model remembers at the end of an item, keys and values of attention included.
    """

    task: str = ""
    architecture: str = ""
    seed: int = 0
    lr: float = 0.0
    figure: str = "accuracy"
    recalls: bool = False
    value: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    state_bytes: int = 0
    parameters: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcomes:
    runs: list[Outcome] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # by folder: why


def run_grid(
    grid: Grid, seeds: int = 1, console: Console | None = None, on_step: Callable[[int], None] | None = None
) -> Outcomes:
    """Runs what is not done of a grid with so many seeds; writes `tasks.json` after each training.

    A training that fails leaves the others be. It counts as failed where it did at all learning rates.

    Raises:
        RunError: it was started as several processes, or its folder cannot be used.
        StudentError, TeacherError: a model of these sizes and layers cannot be.
        Stopped: by SIGTERM; what was done is kept.
    """
    root, config = Path(grid.config.run.dir), grid.config
    accelerator = make_accelerator(Recipe(run=RunConfig(device=config.run.device)))
    if accelerator.num_processes > 1:
        raise RunError("tasks trains one small model after the other: start it as one process")
    for architecture in grid.architectures.values():  # refused now rather than after hours
        _model(grid, next(iter(grid.tasks.values())).task, architecture, 0)
    runs, found = _Runs(grid, accelerator, console or console_of(), on_step), Outcomes()
    chosen: dict[tuple[str, str], float] = {}  # learning rates
    with alone_in(root):
        for seed in range(config.run.seed, config.run.seed + seeds):
            for name, called in itertools.product(grid.tasks, grid.architectures):
                task, records, failed = grid.tasks[name].task, {}, {}
                for lr in [chosen[name, called]] if (name, called) in chosen else config.train.lrs:
                    folder = StageFolder(root, f"{name}-{called}-lr{lr:g}-seed{seed}")
                    try:
                        records[lr] = runs.record(name, called, lr, seed, folder)
                    except Stopped:
                        raise
                    except TrainingError as error:
                        failed[folder.stage] = str(error)
                        runs.console.print(f"{folder.stage} failed: {error}", highlight=False, markup=False)
                if not records:
                    found.failed.update(failed)
                else:
                    best = min if task.figure == "error" else max
                    lr = chosen[name, called] = best(records, key=lambda lr: records[lr]["validation"])
                    kept = {key: value for key, value in records[lr].items() if key in Outcome.__dataclass_fields__}
                    found.runs.append(Outcome(name, called, seed, lr, task.figure, task.recalls, **kept))
                write_json(root / "tasks.json", found)
    return found


@dataclass(frozen=True)
class _Runs:
    """The trainings of a grid."""

    grid: Grid
    accelerator: Accelerator
    console: Console
    on_step: Callable[[int], None] | None

    def record(self, name: str, called: str, lr: float, seed: int, folder: StageFolder) -> dict[str, Any]:
        """What came of one training, which is done where it is not yet."""
        trial, architecture, config = self.grid.tasks[name], self.grid.architectures[called], self.grid.config
        settings = dataclasses.replace(config.train, steps=trial.steps, lr=lr)
        values = dataclasses.asdict(settings)
        left_out = {*resultless(TasksTrainConfig, values), "lrs"}
        needs = {
            "task": [type(trial.task).__name__, dataclasses.asdict(trial.task)],
            "architecture": architecture.student.facts(),
            "family": config.family,
            "sizes": architecture.sizes,
            "training": {key: value for key, value in values.items() if key not in left_out},
            "measure": dataclasses.asdict(config.measure),
            "seed": seed,
        }
        if folder.why_not_reusable(needs) is None:
            self.console.print(f"{folder.stage}: done before, reused", highlight=False)
            return folder.done or {}
        folder.begin(needs)
        begun = time.monotonic()
        set_seed(seed)
        student = _model(self.grid, trial.task, architecture, seed)
        record = self._trained(trial.task, student, settings, seed, folder)
        record["seconds"] = round(time.monotonic() - begun, 1)
        folder.finish(record)
        self.console.print(f"{folder.stage}: {trial.task.figure} {record['value']:.3f}", highlight=False)
        return record

    def _trained(
        self, task: Task, student: HybridForCausalLM, settings: TasksTrainConfig, seed: int, folder: StageFolder
    ) -> dict[str, Any]:
        objective, items = task.objective(student).to(self.accelerator.device), self.grid.config.measure.items
        groups: list[ParameterGroup] = [{"name": "model", "parameters": objective.trained(), "lr": settings.lr}]
        data, accelerator, console = Generated(task), self.accelerator, self.console
        outcome = train(objective, groups, settings, data, folder, accelerator, console, seed, self.on_step)

        def measured(task: Task, stream: int) -> float:
            return _measured(objective, Generated(task, stream), items, settings.batch_size, seed)

        return {
            "training": outcome.metrics,
            "validation": measured(task, VALIDATION),
            "value": measured(task, TEST),
            "parts": {name: measured(part, TEST) for name, part in task.parts().items()},
            "state_bytes": memory_bytes(student, task.tokens),
            "parameters": sum(parameter.numel() for parameter in objective.trained().values()),
        }


def memory_bytes(student: HybridForCausalLM, length: int) -> int:
    """Bytes that a model remembers of one sequence of so many tokens: states in float32, keys and values in
    bfloat16."""
    total = 0
    for layer, mixer in enumerate(student.mixer_layers()):
        if mixer is None:
            geometry = student.geometry(layer)
            total += length * 2 * 2 * geometry.num_kv_heads * geometry.head_dim
        else:
            window = getattr(mixer, "window", None) if is_attention(student.config.mixers[layer]) else None
            state = mixer.state_bytes()
            total += length * mixer.token_bytes() + (state if window is None else state * min(length, window) // window)
    return total


def _model(grid: Grid, task: Task, architecture: Architecture, seed: int) -> HybridForCausalLM:
    sizes = {"vocab_size": task.vocabulary, **architecture.sizes}
    return untrained(grid.config.family, architecture.student, seed, **sizes)


@torch.no_grad()
def _measured(objective: Answering, items: Generated, count: int, batch_size: int, seed: int) -> float:
    objective.eval()
    found, device = [], next(objective.parameters()).device
    for step, first in enumerate(range(0, count, batch_size)):
        slots = range(min(batch_size, count - first))
        batch = {key: value.to(device) for key, value in collate(items.batch(step, batch_size, seed, slots)).items()}
        found.append(objective.figures(objective.said(batch), batch["answers"]).cpu())
    objective.train()
    return items.task.scored(torch.cat(found))
