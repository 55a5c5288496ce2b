"""Runs a recipe, killing it (SIGKILL) at random moments and starting it again, until it ends by itself.

    python kill_often.py KILLS SECONDS SEED run RECIPE key=value ...

SECONDS is what the whole run takes here: it is killed after up to a third of that. Children are forked from a
process that has imported everything, or starting would take longer than training. After KILLS kills it is left alone.
Prints how often it was killed in each stage, and how long the last start took.
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

kills, whole, seed, arguments = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
folder = Path(next(word.removeprefix("run.dir=") for word in arguments if word.startswith("run.dir=")))
draw, killed = random.Random(seed), collections.Counter()
while True:
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(main(arguments))
    if killed.total() < kills:
        time.sleep(draw.uniform(0.05, 0.3) * whole)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        print("killed", [dict(killed), time.monotonic() - begun], flush=True)
        sys.exit(os.WEXITSTATUS(status))
    done = [stage for stage in transpoint.distill.stages.STAGES if (folder / stage / "done.json").exists()]
    killed[f"after {done[-1] if done else 'nothing'}"] += 1
