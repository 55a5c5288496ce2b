"""Training state on disk: written whole or not at all, checksummed, in safetensors and JSON only.

A checkpoint `step-N/` holds the trained parameters, the optimizer's tensors and the random generators' states. The
position in the data and in the learning-rate schedule is the step itself (see `data.batch_indices`).
"""

import hashlib
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .run import read_json, write_json

logger = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint that could not be written. One line; the earlier ones are intact."""


def save_checkpoint(
    folder: Path, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, keep: int
) -> None:
    """Saves the state after `step` steps as `folder/step-N`, and removes all but the last `keep` checkpoints.

    Raises:
        CheckpointError: the disk is full, say; the checkpoints that were there stay as they are.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tensors = {f"parameter.{name}": p.detach() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors["generator.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["generator.cuda"] = torch.cuda.get_rng_state()
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, partial / "state.safetensors")
        _sync(partial / "state.safetensors")
        write_json(partial / "checkpoint.json", {"step": step, "sha256": _sha256(partial / "state.safetensors")})
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        _sync(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or "No space left" in str(error):
            raise CheckpointError(
                f"checkpoint {final} could not be written ({error}); earlier ones are intact: free some space, "
                "then run the same command to go on"
            ) from error
        raise
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Restores the newest checkpoint that is whole; returns its step, or 0 if there is none.

    A damaged checkpoint is named in a warning, and the one before it is used.
    """
    for path in reversed(_checkpoints(folder)):
        record = read_json(path / "checkpoint.json")
        try:
            if record is None or _sha256(path / "state.safetensors") != record["sha256"]:
                raise ValueError("its contents are not what was written")
            tensors = load_file(path / "state.safetensors")
            if {f"parameter.{name}" for name in parameters} - tensors.keys():
                raise ValueError("it is of another model")
        except (OSError, ValueError, KeyError) as error:
            logger.warning("checkpoint %s is damaged (%s): going back to the one before", path, error)
            continue
        _restore(tensors, parameters, optimizer)
        return record["step"]
    return 0


@torch.no_grad()
def _restore(tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"parameter.{name}"])
        state = {
            key.split(".")[1]: value.to(parameter.device)
            for key, value in tensors.items()
            if key.startswith("optimizer.") and key.split(".", 2)[2] == name
        }
        if state:
            optimizer.state[parameter] = state
    torch.set_rng_state(tensors["generator.cpu"])
    if torch.cuda.is_available() and "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"])


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
