"""The one trainer: every training stage gives it an objective, and it does the rest.

An objective is a module whose `forward(batch)` returns the loss (mean per token) and named metrics. The trainer owns
the schedule, accumulation, logging, checkpoints and resuming; `engines` how a step runs on one process or many.

The host does not wait for the device between log lines: what a step finds out (loss, norm, whether it was skipped)
stays there until a line is written.
"""

import itertools
import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from ..errors import DistillError
from ..run.folder import StageFolder, truncate_log
from ..run.progress import Progress
from ..run.seconds import part
from ..settings import TrainConfig
from .checkpoint import find_checkpoint, load_generators, load_parameters, save_checkpoint
from .engines import Engine, make_engine
from .groups import ParameterGroup, only_these_train
from .nonfinite import first_nonfinite
from .prefetch import batches_ahead
from .protocols import Objective, TrainingData

SPIKE = 2.0  # times the median of the last lines' losses that a loss is worth a word from
LINES = 20


class TrainingError(DistillError, RuntimeError):
    """Training that cannot go on. One line; what was saved stays."""


class Stopped(TrainingError):
    """Training that was asked to stop (SIGTERM), and has saved where it is."""

    exit_code = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Trained:
    """What training came to.

    metrics: those of the last step, tokens seen, seconds, steps skipped. weights: trained parameters by name, whole
    and on the CPU, in the main process; None where they are in the modules that were given.
    """

    metrics: dict
    weights: dict[str, Tensor] | None


def train(
    objective: Objective,
    groups: list[ParameterGroup],
    config: TrainConfig,
    dataset: TrainingData,
    folder: StageFolder,
    accelerator: Accelerator,
    console: Console,
    seed: int,
    on_step: Callable[[int], None] | None = None,
    before_step: Callable[[int], None] | None = None,
    precision: str = "fp32",
    compile: bool = False,
    log: Callable[[dict], None] | None = None,
) -> Trained:
    """Trains for `config.steps` steps, going on from the newest checkpoint in `folder` if there is one.

    Args:
        objective: `forward(batch) -> (loss, {name: metric})`; only the parameters in `groups` are changed.
        groups: what is trained; with a weight decay where it is not the config's.
        dataset: `batch(step, batch_size, seed, slots)` gives items; a `state_dict(slots)`, where there is one, is
            saved with checkpoints and given back to `load_state_dict`.
        on_step: called with each finished step; what tests interrupt a run with.
        before_step: called with the number of steps done before each step; what it does must depend on that alone, so
            that a resumed run is the same.
        precision: of the matrix products: fp32 or bf16 (parameters are in float32 in any case).
        compile: see `make_engine`; on a GPU only.
        log: takes a line of metrics; `folder.log` by default.

    Raises:
        TrainingError: too many steps in a row had a gradient that is not finite; the batch cannot be divided.
        Stopped: SIGTERM, after a checkpoint.
    """
    share, rest = divmod(config.batch_size, accelerator.num_processes)
    micro = config.micro_batch_size or share
    if rest or share % micro:
        raise TrainingError(
            f"{folder.stage}.batch_size is {config.batch_size}; expected a multiple of {accelerator.num_processes} "
            f"processes times micro_batch_size {micro}"
        )
    slots = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    parameters = {name: p for group in groups for name, p in group["parameters"].items()}
    only_these_train(objective, groups)
    # The same for all processes, whatever each of them sees of the disk.
    with part("loading"):
        step, state = find_checkpoint(folder / "checkpoints", set(parameters), accelerator)
        load_parameters(state, parameters)
    groups = [{**group, "weight_decay": group.get("weight_decay", config.weight_decay)} for group in groups]
    # It has what its objective has.
    module = cast(Objective, InPrecision(objective, precision, accelerator.device.type))
    compile = compile and accelerator.device.type == "cuda"

    def say(line: str) -> None:
        console.print(f"{folder.stage}: {line}", highlight=False, markup=False, soft_wrap=True)

    engine = make_engine(module, groups, config.betas, config.clip, share // micro, accelerator, compile, say)
    if step:
        engine.load_optimizer(state)
        load_generators(state, accelerator.process_index)
        if hasattr(dataset, "load_state_dict"):
            dataset.load_state_dict(state["data"])
        console.print(f"{folder.stage}: going on from step {step}")
    del state
    losses: deque[float] = deque(maxlen=LINES)
    told = 0  # skipped steps that the lines tell of
    if accelerator.is_main_process:
        lines = truncate_log(folder / "metrics.jsonl", step)
        losses.extend(line["loss"] for line in lines if line["loss"] is not None)
        told = sum(line.get("skipped", 0) for line in lines)
    accelerator.wait_for_everyone()

    log = log or folder.log
    tokens_per_step = config.batch_size * dataset.tokens_per_item
    begun, last, metrics = time.monotonic(), (time.monotonic(), step), {}
    skips, in_a_row = (torch.full((), count, device=accelerator.device) for count in (told, 0))

    loader = batches_ahead(dataset, range(step, config.steps), config, seed, slots, micro, accelerator.device)
    shown = Progress(console, folder.stage, config.steps, step, tokens_per_step)
    timed = _timed_steps(step, accelerator.device)
    with _released(engine), shown as progress, _sigterm() as asked, timed as line, loader:
        for batches, position in loader:
            sums: dict[str, Tensor] = {}
            if before_step:
                before_step(step)
            for number, batch in enumerate(batches, start=1):
                loss, found = engine.forward_backward(batch, last=number == len(batches))
                for key, value in {"loss": loss, **found}.items():
                    sums[key] = sums.get(key, 0) + value.detach() / len(batches)
            factor = learning_rate_factor(step, config)
            norm, skipped = engine.step(factor)
            skips += skipped
            in_a_row = (in_a_row + 1) * skipped
            step += 1
            logs = step % config.log_every == 0 or step == config.steps
            if logs:
                means = {key: accelerator.reduce(value.float(), "mean").item() for key, value in sums.items()}
                now = time.monotonic()
                metrics = {
                    "step": step,
                    **means,
                    "gradient_norm": float(norm),
                    "lr": config.lr * factor,
                    "tokens": step * tokens_per_step,
                    "tokens_per_second": (step - last[1]) * tokens_per_step / max(now - last[0], 1e-9),
                }
                if (count := int(skips)) > told:
                    metrics["skipped"], told = count - told, count
                metrics = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
                if metrics["loss"] is not None:
                    if len(losses) >= LINES // 4 and metrics["loss"] > SPIKE * statistics.median(losses):
                        metrics["event"] = "loss spike"
                    losses.append(metrics["loss"])
                last = (now, step)
                line(step)
                if accelerator.is_main_process:
                    log(metrics)
                progress.show(step, metrics["loss"])
                _say(console, folder.stage, metrics)
                if in_a_row >= config.max_skipped:
                    raise TrainingError(_why_not_finite(engine, batches, folder.stage, step, int(in_a_row), means))
            else:
                progress.show(step)
            stops = _all_stop(asked, accelerator, logs)
            if step < config.steps and (stops or step % config.checkpoint_every == 0):
                checkpoints, keep = folder / "checkpoints", config.keep_checkpoints
                with part("saving") as clock:
                    save_checkpoint(checkpoints, step, engine.state(), position, keep, accelerator)
                clock.keep()
            if on_step:
                on_step(step)
            if stops and step < config.steps:
                raise Stopped(
                    f"{folder.stage}: asked to stop (SIGTERM), saved at step {step} of {config.steps}; "
                    "the same command goes on from there"
                )
    weights = None
    if engine.shards:
        whole = engine.state() or {}
        weights = {key.split(".", 1)[1]: value for key, value in whole.items() if key.startswith("parameter.")}
    engine.close()
    metrics |= {
        "tokens": config.steps * tokens_per_step,
        "seconds": time.monotonic() - begun,
        "skipped": int(skips),
    }
    return Trained(metrics, weights)


def above_steady(lines: list[tuple[int, float]]) -> float:
    """Seconds that the steps up to the first line of a log took above as many of the median pace between later lines.

    lines: (step, seconds up to there) where training begins, and at each line; 0 where there are no two.
    """
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(lines)]
    if len(spans) < 2:
        return 0.0
    (steps, seconds), *later = spans
    return max(0.0, seconds - steps * statistics.median(seconds / steps for steps, seconds in later))


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Of the highest learning rate, in step `step` (from 0): a linear rise, then a cosine down to `final_lr`."""
    rise = max(1, round(config.warmup * config.steps))
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, config.steps - rise)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class InPrecision(nn.Module):
    """An objective whose matrix products are in another precision than its parameters."""

    def __init__(self, objective: Objective, precision: str, device_type: str):
        super().__init__()
        self.objective = objective
        self.options: dict[str, Any] = {
            "device_type": device_type,
            "dtype": torch.bfloat16,
            "enabled": precision == "bf16",
        }

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("objective"), name)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(**self.options):
            return self.objective(batch)


@contextmanager
def _released(engine: Engine) -> Iterator[None]:
    """Leaves layers as they were where training ends in an error."""
    try:
        yield
    except BaseException:
        engine.release()
        raise


@contextmanager
def _timed_steps(step: int, device: torch.device) -> Iterator[Callable[[int], None]]:
    """Counts what is done meanwhile as steps; `line(step)` is to be called at each line of the log, where the host has
    waited for the device.

    On a GPU what the first line took above the steady pace counts as compiling: layers by torch.compile, kernels by
    Triton, recording, and whatever else is done once. What has to be compiled after the first line (for another kind of
    batch) stays in the steps, as does all of training that ends before the second.
    """
    with part("steps") as clock:
        lines = [(step, clock.of("steps"))]
        try:
            yield lambda step: lines.append((step, clock.of("steps")))
        finally:
            if device.type == "cuda":
                clock.move(above_steady(lines), "steps", "compiling")


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that is set when SIGTERM arrives, in place of dying at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _all_stop(asked: threading.Event, accelerator: Accelerator, logs: bool) -> bool:
    """Whether any process was asked to stop. Several agree on it where they wait for each other anyway."""
    if accelerator.num_processes == 1:
        return asked.is_set()
    if not logs:
        return False
    return bool(accelerator.reduce(torch.tensor(float(asked.is_set()), device=accelerator.device), "sum"))


def _say(console: Console, stage: str, metrics: dict) -> None:
    if "skipped" in metrics:
        console.print(f"{stage}: {metrics['skipped']} steps up to {metrics['step']} skipped: gradient not finite")
    if "event" in metrics:
        console.print(f"{stage}: {metrics['event']} at step {metrics['step']}: {metrics['loss']:.4g}")


def _why_not_finite(engine: Engine, batches: list, stage: str, step: int, in_a_row: int, means: dict) -> str:
    engine.release()  # for the memory that recordings hold, and attention that runs uncompiled
    where = first_nonfinite(engine.module, batches, engine.accelerator.num_processes == 1)
    return (
        f"{stage}: the gradient was not finite in {in_a_row} steps in a row, the last of them step {step} (loss "
        f"{means['loss']:.4g}): first of all {where}. Lower {stage}.lr or set run.precision=fp32: "
        "the weights are as they were before these steps, and the last checkpoint is intact"
    )
