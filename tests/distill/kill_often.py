"""Runs a recipe, killing it (SIGKILL) at random moments and starting it again, until it ends by itself.

    python kill_often.py KILLS SEED run RECIPE key=value ...

Children are forked from a process that has imported everything, or starting would take longer than training. After
KILLS kills it is left alone. Prints how often it was killed in each stage.
"""

import collections
import os
import random
import signal
import sys
import time
from pathlib import Path

import transpoint.distill.stages
from transpoint.distill.cli import main

kills, seed, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
folder = Path(next(word.removeprefix("run.dir=") for word in arguments if word.startswith("run.dir=")))
draw, killed = random.Random(seed), collections.Counter()
while True:
    child = os.fork()
    if child == 0:
        os._exit(main(arguments))
    if killed.total() < kills:
        time.sleep(draw.uniform(0.1, 1.5))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        print("killed", dict(killed), flush=True)
        sys.exit(os.WEXITSTATUS(status))
    done = [stage for stage in transpoint.distill.stages.STAGES if (folder / stage / "done.json").exists()]
    killed[f"after {done[-1] if done else 'nothing'}"] += 1
