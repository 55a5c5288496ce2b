"""Runs a recipe, killing it (SIGKILL) at random moments and starting it again, until it ends by itself.

`kill_often(kills, seed, arguments of the command line, folder of the run)` says how often it was killed after each
stage, and how it ended. It is for a process that has imported everything: its children are forked.
"""

import collections
import os
import random
import signal
import time
from pathlib import Path

from transpoint.distill.cli import main
from transpoint.distill.stages.pipeline import names


def kill_often(kills: int, seed: int, arguments: list[str], folder: Path) -> tuple[dict[str, int], int]:
    """It is killed a random while after it has got a little further than before, or now and then before that; after
    `kills` kills it is left alone."""
    draw, killed = random.Random(seed), collections.Counter()

    def progress():
        return {str(path) for pattern in ("*/done.json", "*/checkpoints/step-*") for path in folder.glob(pattern)}

    while True:
        before = progress()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = main(arguments)
            finally:
                os._exit(code)  # without a second for tidying up
        if killed.total() < kills:
            deadline = time.monotonic() + draw.choice([60.0, 60.0, 60.0, draw.uniform(0.0, 0.5)])
            while (
                time.monotonic() < deadline
                and progress() <= before
                and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            ):
                time.sleep(0.001)
            time.sleep(draw.uniform(0.0, 0.04))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            return dict(killed), os.WEXITSTATUS(status)
        done = [stage for stage in names() if (folder / stage / "done.json").exists()]
        killed[f"after {done[-1] if done else 'nothing'}"] += 1
