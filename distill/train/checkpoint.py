"""Training state on disk: written whole or not at all, checksummed, in safetensors and JSON only.

A checkpoint `step-N/` holds the trained parameters, the optimizer's tensors and the random generators' states, whole
and by name, however they were sharded (see `engines`). The position in the data and in the learning-rate schedule
is the step itself (see `data.batch_indices`), or, of text that is streamed, in its record.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import DistillError
from ..run.files import read_json, sha256, write_json

logger = logging.getLogger(__name__)


class CheckpointError(DistillError, OSError):
    """A checkpoint that could not be written. One line; the earlier ones are intact."""


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Tensor] | None, data: dict | None, keep: int, accelerator: Accelerator
) -> None:
    """Saves the state after `step` steps as `folder/step-N`, and removes all but the last `keep` checkpoints.

    Every process must call it: each gives the state of its random generators and its part of `data`, the main one
    writes.

    Args:
        state: whole tensors by name, of the main process.
        data: the dataset's position, which JSON can hold, by place in a batch; None where the step says it.

    Raises:
        CheckpointError: the disk is full, say; the checkpoints that were there stay as they are.
    """
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    gathered = [(accelerator.process_index, generators, data)]
    if accelerator.num_processes > 1:
        gathered = gather_object(gathered)
    failed = None
    if accelerator.is_main_process:
        try:
            _write(folder, step, cast("dict[str, Tensor]", state), gathered, keep)
        except CheckpointError as error:
            failed = str(error)
    if accelerator.num_processes > 1:
        failed = broadcast_object_list([failed])[0]
    if failed:  # in every process, or the others would wait for this one
        raise CheckpointError(failed)


def find_checkpoint(folder: Path, names: set[str], accelerator: Accelerator) -> tuple[int, dict[str, Any]]:
    """The newest checkpoint that is whole: its step, and its tensors by name with the dataset's position as "data".

    (0, {}) if there is none. A damaged checkpoint is named in a warning, and the one before it is used.

    Args:
        names: of the parameters it must hold.
    """
    found = None
    if accelerator.is_main_process:
        for path in reversed(_checkpoints(folder)):
            record = read_json(path / "checkpoint.json")
            try:
                if record is None or sha256(path / "state.safetensors") != record["sha256"]:
                    raise ValueError("its contents are not what was written")
                with safe_open(path / "state.safetensors", "pt") as file:
                    if {f"parameter.{name}" for name in names} - set(file.keys()):
                        raise ValueError("it is of another model")
            except (OSError, ValueError, KeyError) as error:
                logger.warning("checkpoint %s is damaged (%s): going back to the one before", path, error)
                continue
            found = str(path), record
            break
    if accelerator.num_processes > 1:
        found = broadcast_object_list([found])[0]
    if found is None:
        return 0, {}
    newest, record = found
    return record["step"], {**load_file(Path(newest) / "state.safetensors"), "data": record.get("data")}


@torch.no_grad()
def load_parameters(state: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """Copies the parameters of a checkpoint's state, where it has any, into these."""
    for name, parameter in parameters.items():
        if state:
            parameter.copy_(state[f"parameter.{name}"])


def load_generators(state: dict[str, Tensor], process: int) -> None:
    """Sets the random generators as they were in this process; if there was none such, they stay as they are."""
    if f"generator.cpu.{process}" in state:
        torch.set_rng_state(state[f"generator.cpu.{process}"])
    if f"generator.cuda.{process}" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[f"generator.cuda.{process}"])


def _write(folder: Path, step: int, state: dict[str, Tensor], gathered: list[tuple], keep: int) -> None:
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {key: value.contiguous() for key, value in state.items()}
    record: dict[str, Any] = {"step": step}
    for process, generators, data in gathered:
        tensors |= {f"generator.{device}.{process}": value for device, value in generators.items()}
        if data is not None:
            record.setdefault("data", {}).update(data)
    try:
        save_file(tensors, partial / "state.safetensors")
        _sync(partial / "state.safetensors")
        write_json(partial / "checkpoint.json", {**record, "sha256": sha256(partial / "state.safetensors")})
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


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
