"""The run folder: one folder per stage, and what makes a stage's result still valid.

    RUN/run.lock                    held while a run is at work
    RUN/recipe.yaml                 the resolved recipe of the latest run
    RUN/seconds.json                what the latest run did before its first stage, in seconds
    RUN/STAGE/stage.json            what the stage depends on (its settings, its inputs), written when it starts
    RUN/STAGE/metrics.jsonl         one line per logged step
    RUN/STAGE/checkpoints/step-N/   training state, while it trains
    RUN/STAGE/seconds.json          what it has taken until it was interrupted, see `run.seconds`
    RUN/STAGE/...                   what it made: student/, native/, results.json
    RUN/STAGE/done.json             written last: its presence is what says the stage is done

A stage is reused while everything in its stage.json is as the recipe asks, its input stages included.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import RunError
from .files import read_json, write_json, written_whole
from .identity import identity, started
from .records import StageRecord, read_record


@contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Keeps other runs out of a run folder meanwhile; a run that dies keeps nobody out.

    Raises RunError where another is at work in it, or it cannot be made.
    """
    lock = FileLock(root / "run.lock", timeout=0)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RunError(
            f"another run is at work in {root}: wait until it ends, stop it, or set run.dir to another folder"
        ) from error
    except OSError as error:
        raise RunError(f"the run folder cannot be written: {error}; set run.dir to another place") from error
    try:
        yield
    finally:
        lock.release()


class StageFolder:
    """The folder of one stage, and its records."""

    def __init__(self, run: Path, stage: str):
        self.stage = stage
        self.path = run / stage

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def started(self) -> dict | None:
        """What stage.json holds, or None; as today's version writes it, whichever wrote it."""
        return started(self.path.parent, self.stage)

    @property
    def done(self) -> dict | None:
        """What done.json holds, or None while the stage is not done."""
        found = read_json(self / "done.json")
        return found if isinstance(found, dict) else None

    @property
    def record(self) -> StageRecord:
        """The same, as types; empty while the stage is not done."""
        return read_record(StageRecord, self.done)

    def begin(self, depends_on: dict, anew: bool = False) -> None:
        """Makes the folder ready: what an interrupted start left is kept if it depends on the same, and not `anew`.

        Raises RunError where the folder is not a stage's, or cannot be written.
        """
        # A start that was killed while it wrote stage.json leaves a part of it.
        held = [entry for entry in self.path.glob("*") if not entry.name.startswith(".stage.json.")]
        if held and not (self / "stage.json").is_file():
            raise RunError(f"'{self.path}' holds something else than a stage: set run.dir to another place")
        if anew or self.started is None or identity(self.started) != identity(depends_on) or self.done is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self / "stage.json", depends_on)
        except OSError as error:
            raise RunError(f"the run folder cannot be written: {error}; set run.dir to another place") from error

    def finish(self, record: dict) -> None:
        """Marks the stage done; what it would have gone on from is no longer needed."""
        write_json(self / "done.json", {**record, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        (self / "seconds.json").unlink(missing_ok=True)
        shutil.rmtree(self / "checkpoints", ignore_errors=True)

    def take_over(self, other: "StageFolder", depends_on: dict) -> None:
        """Makes a copy of another run's finished stage this one's."""
        partial = self.path.with_name(f".{self.stage}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            shutil.copytree(other.path, partial)
            write_json(partial / "stage.json", depends_on)
            write_json(partial / "done.json", {**(other.done or {}), "taken_over": str(other.path.parent)})
            shutil.rmtree(self.path, ignore_errors=True)
            partial.rename(self.path)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(f"'{other.path}' cannot be taken over: {error}; free some space, or leave it out") from error

    def log(self, record: dict) -> None:
        """Appends a line to metrics.jsonl."""
        with (self / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def why_not_reusable(self, depends_on: dict) -> str | None:
        """None if the stage is done and depends on just this; else why it must run, in words."""
        if self.started is None:
            return "not run yet"
        old, new = (dict(needs) for needs in (self.started, depends_on))
        changes = _stage_before(*(needs.pop("after", None) or {} for needs in (old, new))) + _differences(old, new)
        if changes:
            return "changed: " + ", ".join(changes[:4]) + (f" and {len(changes) - 4} more" if len(changes) > 4 else "")
        return None if self.done is not None else "interrupted"


def truncate_log(path: Path, last_step: int) -> list[dict]:
    """Drops lines of metrics.jsonl after a step: they will be written again by the resumed run. Returns the others."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
    kept = [line for line in lines if json.loads(line)["step"] <= last_step]
    with written_whole(path) as file:
        file.writelines(line + "\n" for line in kept)
    return [json.loads(line) for line in kept]


def _stage_before(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """What differs in the stage before, by name with the identity of what it made."""
    if old.keys() != new.keys():
        return [f"the stage before ({', '.join(old) or 'none'} -> {', '.join(new) or 'none'})"]
    return [f"what {name} made" for name in old if old[name] != new[name]]


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted(old.keys() | new.keys(), key=str):
            found += _differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        return found
    if old == new:
        return []
    short = [text if len(text := json.dumps(value)) <= 42 else "..." for value in (old, new)]  # a commit, quoted
    if "..." in short and isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [pair for pair in zip(old, new, strict=True) if pair[0] != pair[1]]
        if len(pairs) == 1:  # too long to be shown, but what differs may not be
            return _differences(*pairs[0], key)
    return [f"{key} ({short[0]} -> {short[1]})"]
