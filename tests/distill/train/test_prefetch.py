"""Batches that are made ready in the background: in order, and errors come as they would without it."""

import json
import threading

import pytest
import torch
import zstandard

from transpoint.distill.data.sources import DataError
from transpoint.distill.settings import TrainConfig
from transpoint.distill.train.prefetch import batches_ahead


class Numbered:
    """Items that hold step and place; what it raises in step `fails`, and how far it was read."""

    def __init__(self, fails=None, error=None):
        self.fails, self.error, self.step = fails, error, None

    def batch(self, step, batch_size, seed, places):
        if step == self.fails:
            raise self.error
        self.step = step
        return [{"input_ids": torch.tensor([step, place])} for place in places]

    def state_dict(self, places):
        return {"step": self.step}


def loader(dataset, steps=range(3, 9)):
    return batches_ahead(dataset, steps, TrainConfig(batch_size=8), 0, range(4, 8), 2, torch.device("cpu"))


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_batches_come_in_order_with_the_position_after_them():
    with loader(Numbered()) as batches:
        found = [([batch["input_ids"].tolist() for batch in micro], state) for micro, state in batches]
    assert found == [([[[step, 4], [step, 5]], [[step, 6], [step, 7]]], {"step": step}) for step in range(3, 9)]
    assert not threads()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [DataError("a.jsonl: damaged"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("fails", [3, 6, 8])
def test_an_error_comes_itself_after_the_batches_before_it(fails, error):
    seen = []
    with pytest.raises(type(error)) as caught, loader(Numbered(fails, error)) as batches:
        for _, state in batches:
            seen.append(state["step"])
    assert caught.value is error and seen == list(range(3, fails)) and not threads()


@pytest.mark.timeout(60)
def test_leaving_early_ends_the_thread():
    with pytest.raises(ZeroDivisionError), loader(Numbered(), range(10**9)) as batches:
        next(iter(batches))
        assert threads()
        raise ZeroDivisionError
    assert not threads()


@pytest.mark.timeout(120)
def test_text_that_turns_out_damaged_in_training_is_named(run_tiny, tmp_path):
    rows = "".join(json.dumps({"text": f"document {i} of the file, {i * i} " * 3}) + "\n" for i in range(400))
    path, raw = tmp_path / "a.jsonl.zst", rows.encode()
    cut = zstandard.compress(raw[: len(raw) // 2]) + zstandard.compress(raw[len(raw) // 2 :])[:-200]
    path.write_bytes(cut)
    options = [f"data.train=[{path}]", "data.streaming=true", "data.max_train_tokens=null", "data.shuffle_buffer=20"]
    taken = []
    with pytest.raises(DataError) as caught:
        run_tiny(tmp_path / "run", *options, "align.steps=100000", until_stage="align", on_step=taken.append)
    assert taken and str(caught.value).startswith(f"{path}: reading failed after ")
    assert not threads()
