"""Runs a recipe, killing it (SIGKILL) at random moments and starting it again, until it ends by itself.

    python kill_often.py KILLS SEED run RECIPE key=value ...

It is killed a random while after it has got a little further than before, or now and then before that. Children are
forked from a process that has imported everything, or starting would take longer than training. After KILLS kills it is
left alone. Prints how often it was killed after each stage.
"""

import collections
import os
import random
import signal
import sys
import time
from pathlib import Path

import preload  # noqa: F401 - here, and not in every child
from transpoint.distill.cli import main
from transpoint.distill.stages.pipeline import names

kills, seed, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
folder = Path(next(word.removeprefix("run.dir=") for word in arguments if word.startswith("run.dir=")))
draw, killed = random.Random(seed), collections.Counter()


def progress():
    return {str(path) for pattern in ("*/done.json", "*/checkpoints/step-*") for path in folder.glob(pattern)}


while True:
    before = progress()
    child = os.fork()
    if child == 0:
        os._exit(main(arguments))
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
        print("killed", dict(killed), flush=True)
        os._exit(os.WEXITSTATUS(status))  # without a second for tidying up
    done = [stage for stage in names() if (folder / stage / "done.json").exists()]
    killed[f"after {done[-1] if done else 'nothing'}"] += 1
