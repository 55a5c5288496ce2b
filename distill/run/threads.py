"""How PyTorch's threads on a CPU share it with other processes. What is set here counts before torch is loaded."""

import os
from collections.abc import MutableMapping

SPIN = "3000"  # rounds that a thread waits for the others before it gives up its core
SAMPLE = 0.5  # seconds


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Has threads wait for each other without taking a core for long, unless a person has chosen.

    Where another process is at work on as many cores, each wait would take as long as it is given the core: a step took
    30 s instead of 0.7. It counts where it is set before torch is loaded, in this process or its children.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPIN


def leave_busy_cores(environment: MutableMapping[str, str]) -> str | None:
    """Takes only the cores that nobody else is at work on, unless a person has chosen; returns what to say of it.

    Threads that share a core are half as fast, and all others wait for them: beside one busy process on two cores a
    step takes 2.4 times as long with two threads, and 1.4 times with one.
    """
    import psutil

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if len(cores) == 1 or {"OMP_NUM_THREADS", "WORLD_SIZE"} & environment.keys():  # a launcher has chosen, too
        return None
    load = psutil.cpu_percent(SAMPLE, percpu=True)
    busy = round(sum(load[core] for core in cores if core < len(load)) / 100)
    if not busy:
        return None
    threads = max(1, len(cores) - busy)
    environment["OMP_NUM_THREADS"] = str(threads)
    return (
        f"{busy} of {len(cores)} cores are at work on something else, so this takes {threads}; "
        f"OMP_NUM_THREADS={len(cores)} takes all of them"
    )
