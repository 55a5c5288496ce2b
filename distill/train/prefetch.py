"""Batches made ready while the device works on the one before."""

import queue
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ..data.packed import collate
from ..settings import TrainConfig
from .protocols import TrainingData

AHEAD = 2  # batches that wait to be used


class batches_ahead:
    """Iterates over steps: (micro-batches on the device, state of the dataset after them).

    A thread reads and collates, in pinned memory where there is a GPU. The state is what `dataset.state_dict(slots)`
    gave right after them, as the thread is further than the training by now; None where the dataset has none. Use it as
    a context manager: leaving it ends the thread.

    Args:
        steps: numbers of the steps to come.
        slots: this process's slots in a batch, `micro` of which make up a micro-batch.
    """

    def __init__(
        self,
        dataset: TrainingData,
        steps: range,
        config: TrainConfig,
        seed: int,
        slots: range,
        micro: int,
        device: torch.device,
    ):
        self._dataset, self._steps, self._config, self._seed = dataset, steps, config, seed
        self._slots, self._micro, self._device = slots, micro, device
        self._queue: queue.Queue = queue.Queue(maxsize=AHEAD)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)

    def __enter__(self) -> "batches_ahead":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        self._thread.join()

    def __iter__(self) -> Iterator[tuple[list[dict[str, Tensor]], dict | None]]:
        for _ in self._steps:
            batches, state = self._queue.get()
            if isinstance(batches, BaseException):
                raise batches
            yield [self._moved(batch) for batch in batches], state

    def _moved(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self._device, non_blocking=True) for key, value in batch.items()}

    def _fill(self) -> None:
        for step in self._steps:
            ready: tuple[list[dict[str, Tensor]] | BaseException, dict | None]
            try:
                ready = self._make(step)
            except BaseException as error:  # goes on in the thread that trains
                ready = error, None
            while not self._ended.is_set():
                try:
                    self._queue.put(ready, timeout=0.05)
                    break
                except queue.Full:
                    continue
            if self._ended.is_set() or isinstance(ready[0], BaseException):
                return

    def _make(self, step: int) -> tuple[list[dict[str, Tensor]], dict | None]:
        items = self._dataset.batch(step, self._config.batch_size, self._seed, self._slots)
        batches = [collate(items[first : first + self._micro]) for first in range(0, len(items), self._micro)]
        if self._device.type == "cuda":
            batches = [{key: value.pin_memory() for key, value in batch.items()} for batch in batches]
        state = self._dataset.state_dict(self._slots) if hasattr(self._dataset, "state_dict") else None
        return batches, state
