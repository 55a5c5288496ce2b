"""Where the metrics of training go: metrics.jsonl always, and the trackers that `run.trackers` names.

Names that other parts read (`report`): `loss`, `layer_N` and `attention_N` (alignment of one layer), `lr...`,
`gradient_norm`, `tokens`, `tokens_per_second`, `mfu` (a fraction), `memory` (bytes, the peak on one device), and
`skipped` (steps since the line before whose gradient was not finite) and `event` (text).
"""

import json
import logging
import uuid
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import is_tensorboard_available, is_trackio_available, is_wandb_available

from ..config import Recipe, for_others
from ..errors import RunError
from ..run.files import read_json, write_json
from ..run.folder import StageFolder

PROJECT = "transpoint"  # of Weights & Biases and trackio
_INSTALLED = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
}
logger = logging.getLogger(__name__)


def check_trackers(names: list[str]) -> None:
    """Raises RunError for a tracker that is not installed."""
    for name in names:
        if not _INSTALLED[name]():
            raise RunError(f"run.trackers names {name}, which is not installed: pip install {name}, or leave it out")


class Tracking:
    """The log of one training stage. On processes other than the main one it does nothing.

    Each stage is a run of its own in every tracker, and metrics are named STAGE/NAME there. TensorBoard's files are in
    RUN/tracking/STAGE. A resumed stage goes on in the same tracker run, which is not told again the steps it knows; so
    this is made before what metrics.jsonl says of steps after the last checkpoint is dropped.

    Raises:
        RunError: a tracker does not start (no login, no network).
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe, stage: str, folder: StageFolder):
        self.stage, self.folder, self.trackers = stage, folder, []
        self._main, self._told = accelerator.is_main_process, 0
        names = list(dict.fromkeys(recipe.run.trackers))
        if not self._main or not names:
            return
        for name, (arguments, keywords) in self._options(names).items():
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](*arguments, **keywords)
                tracker.start()
                if not self._told:
                    tracker.store_init_configuration(_flat(for_others(recipe.to_dict())))
            except Exception as error:  # whatever these libraries raise
                self.close()
                raise RunError(
                    f"run.trackers: {name} does not start ({type(error).__name__}: {error}); leave it out to train "
                    "without it"
                ) from error
            self.trackers.append(tracker)

    def log(self, metrics: dict) -> None:
        """Writes down the metrics of a step, `step` among them. Numbers and texts go to the trackers too.

        A tracker that fails is given up, with a warning: it must not cost a run.
        """
        if not self._main:
            return
        self.folder.log(metrics)
        step = metrics["step"]
        if step <= self._told:
            return
        values = {
            f"{self.stage}/{name}": value
            for name, value in metrics.items()
            if isinstance(value, int | float | str) and name != "step"
        }
        for tracker in list(self.trackers):
            try:
                tracker.log(values, step=step)
            except Exception as error:
                logger.warning(
                    "%s failed (%s: %s): training goes on without it", tracker.name, type(error).__name__, error
                )
                self.trackers.remove(tracker)

    def close(self) -> None:
        """Ends the trackers' runs, and waits for what they still have to send."""
        while self.trackers:
            tracker = self.trackers.pop()
            try:
                tracker.finish()
            except Exception as error:
                logger.warning("%s failed at its end (%s: %s)", tracker.name, type(error).__name__, error)

    def _options(self, names: list[str]) -> dict[str, tuple[tuple, dict]]:
        """For each of these trackers the arguments of accelerate's class for it."""
        root = self.folder.path.parent
        name, files = root.resolve().name, root / "tracking"
        files.mkdir(parents=True, exist_ok=True)
        # Kept in the stage's folder, which goes when the stage begins anew: then it is another run.
        record = self.folder / "tracking.json"
        known = read_json(record) or {"id": uuid.uuid4().hex[:8], "told": 0}
        self._told = known["told"] = max(known["told"], _last_step(self.folder / "metrics.jsonl"))
        write_json(record, known)
        run = f"{name}-{self.stage}-{known['id']}"
        options: dict[str, tuple[tuple, dict]] = {
            # What an earlier start of this stage left in this folder is not shown from `purge_step` on.
            "tensorboard": ((self.stage, str(files)), {"purge_step": self._told + 1}),
            "wandb": ((PROJECT,), {"id": run, "name": run, "group": name, "resume": "allow", "dir": str(files)}),
            "trackio": ((PROJECT,), {"name": run, "group": name, "resume": "allow"}),
        }
        return {name: options[name] for name in names}


def _last_step(log: Path) -> int:
    """The last step in metrics.jsonl; 0 where there is none."""
    last = 0
    if log.exists():
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                last = max(last, json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):  # the line that was being written when a process was killed
                continue
    return last


def _flat(values: dict, prefix: str = "") -> dict:
    """{"align.steps": 100}: what trackers take as settings."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
