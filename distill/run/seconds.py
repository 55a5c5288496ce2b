"""Where the time of a run goes: seconds of each stage by part, on the wall clock of the main process.

What works names its part, `with part("loading"):` or `@part("loading")`; the clock that ticks meanwhile is the stage's.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path

from .files import read_json, write_json
from .records import StageRecord, read_record

OTHER = "other"  # what is in no part
PARTS = (
    "importing",  # libraries, before the first stage
    "loading",  # teacher, students and checkpoints from disk
    "tokenising",  # text, or reading what was tokenised before
    "building",  # the student, from the teacher
    "fitting",  # what calibrate sets
    "searching",  # for the layers that keep attention
    "compiling",  # see `train.trainer`
    "steps",
    "saving",  # students and checkpoints to disk
    "measuring",  # quality on held-out text
    "exporting",
    "verifying",
    "tasks",
    "recall",
    "answers",
    "cost",
    OTHER,
)


class Clock:
    """Counts seconds by part. Parts nest, and a second counts for the innermost alone.

    Args:
        file: holds what earlier starts came to, where they were interrupted; it counts this start from now on.
    """

    def __init__(self, file: Path | None = None):
        before = StageRecord() if file is None else read_record(StageRecord, read_json(file))
        self.seconds, self.starts = dict(before.seconds), (before.starts or 0) + 1
        self._file, self._parts = file, [OTHER]
        self._since = time.monotonic()
        self.keep()

    @contextmanager
    def part(self, name: str) -> Iterator["Clock"]:
        """Counts what is done meanwhile as this part."""
        self._turn()
        self._parts.append(name)
        try:
            yield self
        finally:
            self._turn()
            self._parts.pop()

    def of(self, name: str) -> float:
        """Seconds of a part up to now."""
        self._turn()
        return self.seconds.get(name, 0.0)

    def start_again(self) -> dict:
        """The record up to now; what follows is counted from nothing."""
        record = self.record()
        self.seconds.clear()
        return record

    def move(self, seconds: float, part: str, to: str) -> None:
        """Counts seconds of one part as another's."""
        self.seconds[part] = self.seconds.get(part, 0.0) - seconds
        self.seconds[to] = self.seconds.get(to, 0.0) + seconds

    def record(self) -> dict:
        """For the record of a stage."""
        self._turn()
        seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        return {"stage_seconds": round(sum(self.seconds.values()), 2), "seconds": seconds, "starts": self.starts}

    def keep(self) -> None:
        """Leaves in the file what was counted, for another start. A disk that is full must not end a run for that."""
        if self._file is not None:
            with suppress(OSError):
                write_json(self._file, self.record())

    def stand_still(self) -> None:
        """What was done since it was last looked at was another clock's."""
        self._since = time.monotonic()

    def _turn(self) -> None:
        now = time.monotonic()
        self.seconds[self._parts[-1]] = self.seconds.get(self._parts[-1], 0.0) + now - self._since
        self._since = now


_ticking: ContextVar[Clock | None] = ContextVar("clock", default=None)  # none in threads of their own


@contextmanager
def ticking(clock: Clock) -> Iterator[Clock]:
    """Meanwhile this is the clock that parts are counted by, and the one before stands still. Where it ends in an error
    its file keeps the seconds."""
    before = _ticking.get()
    if before is not None:
        before._turn()
    clock.stand_still()
    token = _ticking.set(clock)
    try:
        yield clock
    except BaseException:
        clock.keep()
        raise
    finally:
        _ticking.reset(token)
        if before is not None:
            before.stand_still()


@contextmanager
def part(name: str) -> Iterator[Clock]:
    """Counts what is done meanwhile as this part, on the clock that ticks; a new one where none does."""
    clock = _ticking.get()
    with nullcontext(clock) if clock is not None else ticking(Clock()) as clock, clock.part(name):
        yield clock
