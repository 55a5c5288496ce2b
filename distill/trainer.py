"""The one trainer: every training stage gives it an objective, and it does the rest.

An objective is a module whose `forward(batch)` returns the loss (mean per token) and named figures. The trainer owns
the optimizer, the schedule, accumulation, clipping, logging, checkpoints and resuming; `accelerate` owns devices,
precision and processes.
"""

import math
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .data import PackedDataset, collate
from .progress import Progress
from .run import StageFolder, truncate_log


class TrainingError(RuntimeError):
    """Training that cannot go on. One line; what was saved stays."""


def train(
    objective: nn.Module,
    groups: list[dict],
    config: TrainConfig,
    dataset: PackedDataset,
    folder: StageFolder,
    accelerator: Accelerator,
    console: Console,
    seed: int,
    on_step: Callable[[int], None] | None = None,
    before_step: Callable[[int], None] | None = None,
) -> dict:
    """Trains for `config.steps` steps, going on from the newest checkpoint in `folder` if there is one.

    Args:
        objective: `forward(batch) -> (loss, {name: figure})`; only the parameters in `groups` are changed.
        groups: [{"name", "parameters": {name: parameter}, "lr"}].
        on_step: called with each finished step; what tests interrupt a run with.
        before_step: called with the number of steps done before each step; what it does must depend on that alone, so
            that a resumed run is the same.

    Returns:
        Figures of the last step, tokens seen, seconds.

    Raises:
        TrainingError: the loss is not finite.
    """
    parameters = {name: p for group in groups for name, p in group["parameters"].items()}
    for parameter in objective.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(_decayed(groups, config.weight_decay), betas=tuple(config.betas), fused=True)
    step = load_checkpoint(folder / "checkpoints", parameters, optimizer)
    if accelerator.is_main_process:
        truncate_log(folder / "metrics.jsonl", step)
    accelerator.wait_for_everyone()
    if step:
        console.print(f"{folder.stage}: going on from step {step}")
    objective, optimizer = accelerator.prepare(objective, optimizer)

    share, rest = divmod(config.batch_size, accelerator.num_processes)
    micro = config.micro_batch_size or share
    if rest or share % micro:
        raise TrainingError(
            f"{folder.stage}.batch_size is {config.batch_size}; expected a multiple of {accelerator.num_processes} "
            f"processes times micro_batch_size {micro}"
        )
    tokens_per_step = config.batch_size * dataset.tokens_per_item
    begun, last, figures = time.monotonic(), (time.monotonic(), step), {}
    with Progress(console, folder.stage, config.steps, step, tokens_per_step) as progress:
        while step < config.steps:
            factor = learning_rate_factor(step, config)
            for group in optimizer.param_groups:
                group["lr"] = group["top_lr"] * factor
            places = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
            mine = dataset.batch(step, config.batch_size, seed, places)
            sums: dict[str, Tensor] = {}
            if before_step:
                before_step(step)
            for first in range(0, share, micro):
                batch = collate(mine[first : first + micro])
                batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
                with accelerator.autocast():
                    loss, found = objective(batch)
                accelerator.backward(loss * (micro / share))
                for key, value in {"loss": loss, **found}.items():
                    sums[key] = sums.get(key, 0) + value.detach() * (micro / share)
            norm = accelerator.clip_grad_norm_(list(parameters.values()), config.clip)
            if not torch.isfinite(norm):
                raise TrainingError(
                    f"{folder.stage}: the gradient at step {step + 1} is not finite (loss {float(sums['loss']):.4g}); "
                    f"lower {folder.stage}.lr or run.precision=fp32; the last checkpoint is intact"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % config.log_every == 0 or step == config.steps:
                means = {key: accelerator.reduce(value.float(), "mean").item() for key, value in sums.items()}
                now = time.monotonic()
                figures = {
                    "step": step,
                    **means,
                    "gradient_norm": float(norm),
                    "lr": config.lr * factor,
                    "tokens": step * tokens_per_step,
                    "tokens_per_second": (step - last[1]) * tokens_per_step / max(now - last[0], 1e-9),
                }
                last = (now, step)
                if accelerator.is_main_process:
                    folder.log(figures)
                progress.show(step, figures["loss"])
            else:
                progress.show(step)
            if accelerator.is_main_process and step % config.checkpoint_every == 0 and step < config.steps:
                save_checkpoint(folder / "checkpoints", step, parameters, optimizer, config.keep_checkpoints)
            if on_step:
                on_step(step)
    accelerator.free_memory()  # it would hold on to the objective and the optimizer's state
    return {**figures, "tokens": config.steps * tokens_per_step, "seconds": time.monotonic() - begun}


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Of the highest learning rate, in step `step` (from 0): a linear rise, then a cosine down to `final_lr`."""
    rise = max(1, round(config.warmup * config.steps))
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, config.steps - rise)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def _decayed(groups: list[dict], weight_decay: float) -> list[dict]:
    """AdamW's parameter groups: weight decay on matrices only."""
    out = []
    for group in groups:
        for decay, of_kind in ((weight_decay, lambda p: p.ndim == 2), (0.0, lambda p: p.ndim != 2)):
            chosen = [p for p in group["parameters"].values() if of_kind(p)]
            if chosen:
                out.append({"params": chosen, "lr": group["lr"], "top_lr": group["lr"], "weight_decay": decay})
    return out
