"""Tasks of EleutherAI's lm-evaluation-harness (package `lm_eval`, extra `eval`), on a model as it is in memory.

The figures are the harness's own, with its seeds, and nothing is sent anywhere: a task whose data lies on this machine
needs no network. What `lm_eval` brings is imported only here, since most runs do without.
"""

import copy
import difflib
import glob
import logging
import os
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RunError
from ..run.files import one_line
from ..run.records import TaskScore, number
from ..run.seconds import part

BOOTSTRAP = 1000  # samples of a standard error that has no formula, such as perplexity's; the harness draws 100,000
_NAMED = re.compile(rb"""^["']?(?:task|group|tag)["']?: *["']?([\w.-]+)""", re.MULTILINE)  # in a task's file


@part("tasks")
def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    folder: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[TaskScore]:
    """The model's scores at tasks of the harness, each with its own prompt and few-shot examples.

    The generators of Python, numpy and torch are seeded, as the harness does it.

    Args:
        tasks: names of tasks, or of groups or tags of them.
        folder: of task files (YAML), which are there besides the harness's own and come before them. Their data files
            are looked for from the current directory, from this folder, and from the one above it.
        limit: how many documents of each task, the first ones; all where it is None.

    Raises:
        RunError: `lm_eval` is missing, a task is not known, or it fails.
    """
    try:
        import lm_eval
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise _missing(error) from error
    manager, training, scores = _task_manager(tasks, folder), model.training, []
    with _quiet():
        # A copy, since it is given a padding token where it has none. Logits in bfloat16 would give the same
        # log-probability to answers that differ.
        lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            batch_size=batch_size,
            softmax_dtype="float32",
        )
    try:
        for task in tasks:  # one by one, to know which of them fails
            try:
                # What `simple_evaluate` does, without asking git, the hub and the system about where it runs.
                with _quiet():
                    random.seed(DEFAULT_RANDOM_SEED)
                    np.random.seed(DEFAULT_OTHER_SEED)
                    torch.manual_seed(DEFAULT_OTHER_SEED)
                    loaded = manager.load([task])
                    for part in loaded["tasks"].values():
                        part.set_fewshot_seed(DEFAULT_OTHER_SEED)
                    found = lm_eval.evaluate(lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
            except Exception as error:
                raise RunError(f"task '{task}' fails: {one_line(error)}") from error
            scores += _scores(found)
    finally:
        model.train(training)
    return scores


def check_tasks(tasks: list[str], folder: str | None = None) -> None:
    """Raises RunError where `lm_eval` is missing, or a task is not known."""
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise _missing(error) from error
    _task_manager(tasks, folder)


def _missing(error: ImportError) -> RunError:
    return RunError(f"{error.name or 'lm_eval'} is missing: pip install 'transpoint[eval]'")


def _task_manager(tasks: list[str], folder: str | None) -> Any:
    """The harness's index of tasks, where each of these is."""
    if folder is not None and not os.path.isdir(folder):
        raise RunError(f"there is no folder of tasks '{folder}'")
    files = sorted(Path(folder).rglob("*.yaml")) if folder is not None else []
    written = tuple((path, path.lstat().st_mtime_ns) for path in files)
    return _index(tuple(tasks), folder, os.getcwd(), written)


@lru_cache(maxsize=1)  # a run asks before it starts and for each model, and groups take many seconds
def _index(tasks: tuple[str, ...], folder: str | None, *depends_on: Any) -> Any:
    """As `_task_manager`. depends_on: what else the answer does, so that it is made anew where that is another."""
    from lm_eval.tasks import TaskManager, __file__ as harness
    from lm_eval.tasks._factory import TaskFactory

    own = [folder] if folder is not None else []
    with _quiet():
        manager = TaskManager(include_path=own, include_defaults=False)
        if not set(tasks) <= set(manager.all_subtasks):  # groups may name the harness's own
            # Parsing all of those takes many seconds: not for a name that stands in none of them, nor for single tasks.
            files = sorted(Path(harness).parent.rglob("*.yaml"), key=Path.as_posix)
            texts = {path: path.read_bytes() for path in files}
            named = {path: {name.decode() for name in _NAMED.findall(text)} for path, text in texts.items()}
            nowhere = [task for task in tasks if not any(task.encode() in text for text in texts.values())]
            _refuse_unknown(nowhere, [*manager.all_tasks, *set().union(*named.values())], folder)
            places = dict.fromkeys(str(path.parent) for path in files if not named[path].isdisjoint(tasks))
            # In the whole index the first of a name counts, among folders the last.
            manager = TaskManager(include_path=[*reversed(places), *own], include_defaults=False)
            if not set(tasks) <= set(manager.all_subtasks):
                manager = TaskManager(include_path=own)
    _refuse_unknown(tasks, manager.all_tasks, folder)
    if folder is not None:
        place = Path(folder).absolute()

        class Factory(TaskFactory):
            """Finds data files where `datasets`, which looks in the current directory alone, would not."""

            def _load_full_config(self, *args, **kwargs) -> dict[str, Any]:
                config = super()._load_full_config(*args, **kwargs)
                data = config.get("dataset_kwargs") or {}
                if "data_files" in data and "/" not in str(config.get("dataset_path")):  # else files of a repository
                    config["dataset_kwargs"] = data | {"data_files": _found(data["data_files"], place)}
                return config

        manager._factory = Factory()
    return manager


def _refuse_unknown(tasks: Iterable[str], known: list[str], folder: str | None) -> None:
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3)
            raise RunError(
                f"task '{task}' is not known to lm_eval"
                + (f", nor in '{folder}'" if folder is not None else "")
                + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
            )


def _found(files: Any, folder: Path) -> Any:
    """Data files, as `datasets` takes them, with their paths where they are; those that are nowhere as they were."""
    if isinstance(files, dict):
        return {split: _found(part, folder) for split, part in files.items()}
    if isinstance(files, list):
        return [_found(part, folder) for part in files]
    places = (str(base / files) for base in (Path.cwd(), folder, folder.parent))
    return next((place for place in places if glob.glob(place, recursive=True)), files)


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    """The harness has a figure under `metric,filter`, and its standard error under `metric_stderr,filter`."""
    scores = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                scores.append(
                    TaskScore(
                        task=task,
                        metric=metric if filtered == "none" else key,
                        value=number(value),
                        stderr=number(values.get(f"{metric}_stderr,{filtered}")),
                        higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                        samples=values.get("sample_len"),
                    )
                )
    return scores


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log, and without its bars and lines, for which it has no setting."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else it forks a process a core for standard errors
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
            yield
    finally:
        log.setLevel(level)
