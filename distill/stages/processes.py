"""The processes that were launched: what kind they are, and whether they can train together."""

import os
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..config import Recipe
from ..errors import RunError

_DISTRIBUTED = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate's handle on the processes that were launched. Raises RunError where they cannot train together."""
    device = recipe.run.device
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not on_gpu:
        raise RunError("run.device is cuda, but no GPU is to be seen; set run.device=cpu")
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    deepspeed, fsdp = (_asked_for(f"ACCELERATE_USE_{kind}") for kind in ("DEEPSPEED", "FSDP"))
    if deepspeed and device == "cpu" and torch.cuda.is_available():
        raise RunError("DeepSpeed takes the GPU where there is one: leave out run.device=cpu, or hide the GPU")
    alone = (
        f"{wanted} processes were launched, but they do not see each other (world size 1): each would train alone; "
        "check the launch configuration"
    )
    if wanted > 1 and "MASTER_ADDR" not in os.environ:
        raise RunError(alone)
    # Unasked, DeepSpeed on CPUs leaves each process alone.
    handlers = [InitProcessGroupKwargs(backend="gloo")] if not on_gpu and wanted > 1 else []
    if deepspeed and not on_gpu:
        _without_shared_memory_op()
    # Precision is the trainer's, so that parameters are in float32 under every engine.
    accelerator = Accelerator(cpu=not on_gpu and not deepspeed, mixed_precision="no", kwargs_handlers=handlers)
    if deepspeed:  # or transformers would shard each model as it loads it, the teacher too
        unset_hf_deepspeed_config()
    if fsdp and accelerator.distributed_type == DistributedType.MULTI_CPU:  # accelerate has FSDP on GPUs only
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    # Whenever accelerate looks its state up, it takes this one's kind, and so forgets FSDP after the first optimizer.
    PartialState().distributed_type = accelerator.distributed_type
    if accelerator.distributed_type not in _DISTRIBUTED:
        raise RunError(
            f"{accelerator.distributed_type.value} is not supported: choose one process, DDP, DeepSpeed or FSDP2 with "
            "`accelerate config`, or a file as `transpoint init` names"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RunError("FSDP version 1 is not supported: set fsdp_version: 2 in accelerate's configuration")
    if accelerator.num_processes != wanted:
        raise RunError(alone)
    return accelerator


def _without_shared_memory_op() -> None:
    """Between processes on CPUs DeepSpeed would compile an operation of its own: a minute, and a C++ compiler. gloo is
    there in any case."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _asked_for(variable: str) -> bool:
    """Whether accelerate's launcher set this."""
    return os.environ.get(variable, "false").lower() == "true"


def precision(recipe: Recipe, device: torch.device) -> str:
    """bf16 or fp32: what `run.precision` says, or what the device multiplies fastest."""
    if recipe.run.precision != "auto":
        return recipe.run.precision
    return "bf16" if device.type == "cuda" or _multiplies_bf16() else "fp32"


def free_memory() -> int:
    """Of the CPU, in bytes: of the machine, or of the container that this runs in, where that has less."""
    free = psutil.virtual_memory().available
    try:
        most, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return min(free, most - used)


def _multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions; without them bfloat16 is slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
