"""How many threads a run takes beside other work."""

import psutil
import pytest

from transpoint.distill.run import threads


@pytest.fixture
def machine(monkeypatch):
    """machine(loads, cores): what psutil and the system say from then on."""

    def make(loads, cores):
        monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: loads)
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: set(cores), raising=False)

    return make


@pytest.mark.parametrize(
    "loads, cores, taken",
    [
        ([3.0, 5.0], [0, 1], None),
        ([99.0, 4.0], [0, 1], "1"),
        ([48.0, 55.0], [0, 1], "1"),  # one process that wanders
        ([100.0, 100.0], [0, 1], "1"),  # one at least
        ([100.0, 0.0, 0.0, 0.0], [0, 1, 2, 3], "3"),
        ([0.0, 0.0, 100.0, 100.0], [0, 1], None),  # others' cores
        ([100.0], [0], None),
    ],
)
def test_cores_that_others_are_at_work_on_are_left_to_them(loads, cores, taken, machine):
    machine(loads, cores)
    environment = {}
    said = threads.leave_busy_cores(environment)
    assert environment.get("OMP_NUM_THREADS") == taken and (said is None) == (taken is None)
    assert said is None or f"so this takes {taken}; OMP_NUM_THREADS={len(cores)} takes all" in said


@pytest.mark.parametrize("chosen", [{"OMP_NUM_THREADS": "2"}, {"WORLD_SIZE": "2"}])
def test_what_a_person_or_a_launcher_has_chosen_stays(chosen, machine):
    machine([100.0, 100.0], [0, 1])
    environment = dict(chosen)
    assert threads.leave_busy_cores(environment) is None and environment == chosen


def test_threads_spin_briefly_unless_told_otherwise():
    environment, chosen = {}, {"OMP_WAIT_POLICY": "ACTIVE"}
    for one in (environment, chosen):
        threads.spin_briefly(one)
    assert environment == {"GOMP_SPINCOUNT": threads.SPIN} and chosen == {"OMP_WAIT_POLICY": "ACTIVE"}
