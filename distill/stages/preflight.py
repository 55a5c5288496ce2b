"""What a training stage is about to do, before it does it: who trains, how much, what it needs; and whether it fits."""

import logging
import shutil
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...students import HybridForCausalLM
from ..config import Recipe
from ..data.rows import check_tokens
from ..errors import RunError
from ..measure.answers import prompt_tokens
from ..models import embedding_rows, output_rows
from ..run.files import one_line
from ..settings import TrainConfig
from ..train.flops import peak_flops
from ..train.groups import ParameterGroup
from .pipeline import stage_of

logger = logging.getLogger(__name__)

UTILISATION = 0.3  # of a GPU's peak, for a first guess at the time
ADAM_BYTES = 8  # of two float32 moments, beside 4 of the weight and 4 of its gradient


def check_disk(folder: Path, groups: list[ParameterGroup], student: HybridForCausalLM, config: TrainConfig) -> None:
    """Raises RunError where the checkpoints of a stage and the student that it leaves would not fit on the disk."""
    kept = min(config.keep_checkpoints, config.steps // config.checkpoint_every) + 1  # one more while it is written
    needed = kept * checkpoint_bytes(groups) + 4 * sum(p.numel() for p in student.parameters())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{kept} checkpoints and the student need {_size(needed)} of disk, {_size(free)} are free at {folder}: "
            "free some space, set run.dir to another disk, or lower keep_checkpoints"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, who: str) -> None:
    """Raises RunError where the tokenizer has tokens that a model has no embedding or no prediction for.

    Models may have more rows than there are tokens: vocabularies are padded, and differently. A special token may be
    beyond the rows, as one added for padding often is; text that holds it is refused by `data.rows.check_tokens`. The
    beginning and the end of text may not: documents are packed with them.
    """
    special = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    used = ((token, number) for token, number in tokenizer.get_vocab().items() if number not in special)
    token, last = max(used, key=lambda item: item[1])
    for name, rows in (("embeddings", embedding_rows(model)), ("output matrix", output_rows(model))):
        if last >= rows:
            raise RunError(
                f"the tokenizer has a token {token!r} of number {last:,}, the {who}'s {name} {rows:,} rows: they do "
                f"not belong together; use the tokenizer that the {who} was trained with, or resize its embeddings"
            )


def check_prompts(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, recipe: Recipe) -> None:
    """Raises RunError or DataError where a prompt of `evaluate` cannot be answered: better now than after training."""
    settings, longest = recipe.evaluate, getattr(model.config, "max_position_embeddings", None)
    for prompt in settings.prompts:
        try:
            ids = prompt_tokens(tokenizer, prompt)["input_ids"]
        except Exception as error:  # a chat template is code of its own
            raise RunError(f"evaluate.prompts: the tokenizer fails on {prompt!r}: {one_line(error)}") from error
        check_tokens(ids, embedding_rows(model), tokenizer, f"prompt {prompt!r}")
        if longest is not None and ids.shape[1] + settings.max_new_tokens > longest:
            raise RunError(
                f"evaluate.prompts: {prompt[:40]!r} has {ids.shape[1]:,} tokens, and with evaluate.max_new_tokens more "
                f"than the teacher's {longest:,} positions: shorten it"
            )


def checkpoint_bytes(groups: list[ParameterGroup]) -> int:
    """Of the trained weights and AdamW's two moments of each, in float32."""
    return (4 + ADAM_BYTES) * _count(groups)


def flops_per_token(
    stage: str, teacher: PreTrainedModel | None, student: HybridForCausalLM, length: int
) -> float | None:
    """Operations that a token costs in a training stage; see `flops`. `requires_grad` must be set.

    None where they cannot be counted: only figures for people are made of them, which stop no training.
    """
    count = stage_of(stage).operations
    try:
        return None if count is None else count(teacher, student, length)
    except Exception as error:  # a model may be of any form
        logger.debug("operations of %s cannot be counted: %s", stage, error)
        return None


def what_will_run(
    stage: str,
    groups: list[ParameterGroup],
    student: HybridForCausalLM,
    teacher: PreTrainedModel | None,
    recipe: Recipe,
    precision: str,
    processes: int = 1,
    sharded: tuple[str, ...] = (),
    device: str | None = None,
) -> Group:
    """What a stage will do, to be printed: parameters of each group, tokens and steps, and what that needs.

    Args:
        groups: as the trainer takes them.
        teacher: None where its predictions are read from a cache.
        precision: of products, bf16 or fp32.
        sharded: of "parameters", "gradients" and "optimizer", what the processes have a shard of each.
        device: the GPU's name, for a guess at the time.
    """
    config: TrainConfig = getattr(recipe, stage)
    length = recipe.length_in(stage)
    tokens = config.batch_size * length
    share = config.batch_size // processes or 1
    micro = config.micro_batch_size or share
    table = Table("trains", "parameters", "learning rate", "weight decay", title=f"{stage}: what will run")
    for group in groups:
        decay = group.get("weight_decay", config.weight_decay)
        table.add_row(group["name"], f"{_count([group]):,}", f"{group['lr']:g}", f"{decay:g}")
    total, trained = sum(p.numel() for p in student.parameters()), _count(groups)
    table.add_row("frozen", f"{total - trained:,}", "", "")
    shards = {part: processes if part in sharded else 1 for part in ("parameters", "gradients", "optimizer")}
    memory = 4 * total / shards["parameters"] + 4 * trained / shards["gradients"]
    memory += ADAM_BYTES * trained / shards["optimizer"]
    if teacher is not None:
        parts = processes if recipe.teacher.share else 1
        layers, whole = (
            sum(p.numel() for p in module.parameters()) for module in (teacher.get_decoder().layers, teacher)
        )
        number = getattr(torch, recipe.training_dtype(precision)).itemsize
        if device is None and parts == 1 and recipe.training_dtype(precision) != recipe.teacher.dtype:  # kept aside
            number += getattr(torch, recipe.teacher.dtype).itemsize
        memory += number * (layers / parts + whole - layers)
    lines = [
        f"{config.steps:,} steps of {config.batch_size} x {length:,} tokens: {config.steps * tokens:,} "
        f"({processes} process{'es' if processes > 1 else ''}, {share // micro} x {micro} sequences a step in each)",
        f"memory of a process, without activations: {_size(memory)}"
        + (f" ({', '.join(sharded)} sharded)" if sharded else "")
        + "; "
        f"disk: {_size(checkpoint_bytes(groups))} a checkpoint, the last {config.keep_checkpoints} kept",
    ]
    peak = peak_flops(device) if device else None
    cost = flops_per_token(stage, teacher, student, length) if peak is not None else None
    if peak is not None and cost is not None:
        flops = cost * config.steps * tokens
        minutes = flops / (UTILISATION * peak * processes) / 60
        lines.append(f"time: about {minutes:.0f} minutes, at {UTILISATION:.0%} of the peak of a {device}")
    return Group(table, *(Text(line) for line in lines))


def gpu_name(device: torch.device) -> str | None:
    """The name of a GPU; None for another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _count(groups: list[ParameterGroup]) -> int:
    return sum(p.numel() for group in groups for p in group["parameters"].values())


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
