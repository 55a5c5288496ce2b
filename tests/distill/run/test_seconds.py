"""Seconds by part, on a clock that a test turns by hand."""

import json
import threading
import time

import pytest

from transpoint.distill.run.seconds import OTHER, Clock, part, ticking


@pytest.fixture
def sleep(monkeypatch):
    """sleep(seconds): they are over at once."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@part("loading")
def load(sleep):
    sleep(3)


def test_a_second_counts_for_the_innermost_part(sleep):
    with ticking(Clock()) as clock:
        sleep(1)
        with part("measuring"):
            sleep(10)
            load(sleep)
            load(sleep)
            sleep(100)
        with pytest.raises(ValueError), part("steps"):
            sleep(1000)
            raise ValueError
    sleep(9)  # after it
    assert clock.seconds == {OTHER: 1, "loading": 6, "measuring": 110, "steps": 1000}


def test_a_clock_stands_still_while_another_ticks(sleep):
    with part("importing") as outer:
        sleep(1)
        with ticking(Clock()) as inner:
            sleep(20)
            load(sleep)
        sleep(4)
        assert outer.of("importing") == 5
    assert inner.seconds == {OTHER: 20, "loading": 3}


def test_no_clock_ticks_in_another_thread(sleep):
    with ticking(Clock()) as clock:
        thread = threading.Thread(target=load, args=[sleep])
        thread.start()
        thread.join()
    assert "loading" not in clock.seconds


def test_starts_that_were_interrupted_add_up(sleep, tmp_path):
    file = tmp_path / "seconds.json"
    for start in (1, 2):
        with pytest.raises(KeyboardInterrupt), ticking(Clock(file)):
            load(sleep)
            sleep(1)
            raise KeyboardInterrupt
        record = {"stage_seconds": 4 * start, "seconds": {OTHER: start, "loading": 3 * start}, "starts": start}
        assert json.loads(file.read_text()) == record
    killed = Clock(file)  # leaves what it kept last
    with ticking(killed):
        load(sleep)
        killed.keep()
        load(sleep)
    with ticking(Clock(file)) as last:
        sleep(0.5)
    assert last.record() == {"stage_seconds": 11.5, "seconds": {OTHER: 2.5, "loading": 9}, "starts": 4}


@pytest.mark.parametrize("content", ["{", "[]", '{"seconds": 3, "starts": "x"}'])
def test_a_damaged_file_counts_as_none(content, sleep, tmp_path):
    (tmp_path / "seconds.json").write_text(content)
    assert Clock(tmp_path / "seconds.json").record() == {"stage_seconds": 0, "seconds": {OTHER: 0}, "starts": 1}


def test_a_file_that_cannot_be_written_ends_nothing(tmp_path):
    Clock(tmp_path / "gone" / "seconds.json").keep()
