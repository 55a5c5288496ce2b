"""Streamed training text: the same batches for any processes and interruptions, every document once an epoch."""

import copy
import json
import logging
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from run_files import TINY, metrics, student
from transpoint.distill.config import ConfigError, load_recipe
from transpoint.distill.data import rows, sources
from transpoint.distill.data.sources import DataError
from transpoint.distill.data.streaming import StreamedDataset
from transpoint.distill.stages.inputs import stage_inputs

EOS = 0
STREAMED = ("data.streaming=true", "data.max_train_tokens=null", "data.shuffle_buffer=5")


def make_tokenizer():
    """One token for each number below 2000, so that a document says which one it is."""
    model = Tokenizer(models.WordLevel({"<eos>": EOS} | {str(n): n for n in range(1, 2000)}, unk_token="<eos>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")


TOKENIZER = make_tokenizer()


def words(number, length):
    """The text of document `number`: `length` tokens that are all its number."""
    return " ".join([str(number)] * length)


def write(path, numbers, length=lambda number: number % 5 + 1):
    """A file with the documents of these numbers, in the form its ending says."""
    rows = [{"text": words(number, length(number)), "other": 1} for number in numbers]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.name.endswith(".zst"):
        path.write_bytes(zstandard.compress(raw))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    elif path.suffix == ".jsonl":
        path.write_bytes(raw)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


def streamed(paths, length=8, shuffle_buffer=4, **options):
    return StreamedDataset([str(p) for p in paths], TOKENIZER, length, shuffle_buffer=shuffle_buffer, **options)


def rows_of(items):
    return [(item["input_ids"].tolist(), item["position_ids"].tolist()) for item in items]


def batches(dataset, steps, size, seed=0, processes=1):
    """(input_ids, position_ids) of whole batches, taken by so many processes; `dataset`: one, or one for each."""
    mine = dataset if isinstance(dataset, list) else [dataset] * processes
    share = size // len(mine)
    return [
        [
            row
            for process, one in enumerate(mine)
            for row in rows_of(one.batch(step, size, seed, range(process * share, (process + 1) * share)))
        ]
        for step in steps
    ]


def documents(lane):
    """The documents in a row of windows of one lane, without one that may be cut off at the end."""
    found, run = [], []
    for token in [token for window in lane for token in window[0]]:
        if token == EOS:
            found.append(tuple(run))
            run = []
        else:
            run.append(token)
    return found


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three sources of different kinds and sizes: 200 documents."""
    folder = tmp_path_factory.mktemp("texts")
    return [
        write(folder / "a.jsonl.zst", range(1, 101)),
        write(folder / "b.parquet", range(101, 181)),
        write(folder / "c.jsonl", range(181, 201)),
    ]


# The same batches, whatever happens


@pytest.mark.parametrize("processes", [2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(processes, texts):
    alone = batches(streamed(texts), range(30), 4)
    assert batches([streamed(texts) for _ in range(processes)], range(30), 4) == alone


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    stops=st.lists(st.integers(1, 12), max_size=4),
    length=st.integers(1, 30),
    buffer=st.integers(1, 50),
    seed=st.integers(0, 2**31),
    processes=st.lists(st.sampled_from([1, 2, 4]), min_size=5, max_size=5),
)
def test_interrupted_anywhere_and_resumed_on_other_processes(texts, stops, length, buffer, seed, processes):
    def fresh():
        return streamed(texts, length, buffer)

    stops = [*stops, 6]
    whole = batches(fresh(), range(sum(stops)), 4, seed)
    found, state = [], None
    for steps, count in zip(stops, processes, strict=False):
        parts = [fresh() for _ in range(count)]
        if state is not None:
            for part in parts:
                part.load_state_dict(json.loads(json.dumps(state)))
        found += batches(parts, range(len(found), len(found) + steps), 4, seed)
        state = {}
        for process, part in enumerate(parts):
            state.update(part.state_dict(range(process * 4 // count, (process + 1) * 4 // count)))
    assert found == whole


def test_a_state_of_the_past_is_not_changed_by_going_on(texts):
    """The trainer's batches are made ahead: what is saved is where an earlier batch ended."""
    dataset = streamed(texts)
    whole = batches(dataset, range(3), 4)
    state = dataset.state_dict(range(4))
    kept = json.dumps(state)
    whole += batches(dataset, range(3, 40), 4)
    assert json.dumps(state) == kept
    dataset.load_state_dict(state)  # the same object, as after a rollback
    assert batches(dataset, range(3, 40), 4) == whole[3:]


def test_any_step_can_be_asked_for(texts, caplog):
    whole = batches(streamed(texts), range(12), 4)
    dataset = streamed(texts)
    assert batches(dataset, [0, 1, 0, 1, 2], 4) == [whole[i] for i in (0, 1, 0, 1, 2)]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert batches(dataset, [11], 4) == [whole[11]]
    assert "no position in the text was saved for step 11: reading up to it" in caplog.text


def test_another_stage_has_its_own_batches(texts):
    """Align and distill share a dataset, each with its own batch size."""
    dataset = streamed(texts)
    batches(dataset, range(5), 4)
    assert batches(dataset, range(5), 2) == batches(streamed(texts), range(5), 2)
    assert batches(dataset, range(5), 2, seed=1) != batches(streamed(texts), range(5), 2)


def test_a_resumed_run_does_not_tokenise_what_was_seen(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", range(1, 1900), lambda number: 6)
    dataset = streamed([path], length=8, shuffle_buffer=10)
    batches(dataset, range(500), 2)
    state = dataset.state_dict(range(2))
    parsed, tokenised = [], []
    real_parse, real_call = sources._parse, PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(sources, "_parse", lambda line: parsed.append(1) or real_parse(line))
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "__call__",
        lambda self, batch, **options: tokenised.extend(batch) or real_call(self, batch, **options),
    )
    resumed = streamed([path], length=8, shuffle_buffer=10)
    resumed.load_state_dict(state)
    batches(resumed, [500], 2)
    assert len(tokenised) <= 20 and len(parsed) <= 40


# Every document, once an epoch


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("buffer", [1, 7, 10_000])
def test_every_document_comes_once_an_epoch_none_is_lost(lanes, buffer, texts):
    dataset = streamed(texts, length=8, shuffle_buffer=buffer)
    rows = batches(dataset, range(400 // lanes + 60), lanes)
    shares = []
    for lane in range(lanes):
        found = documents([batch[lane] for batch in rows])
        size = len(set(found))
        epochs = [found[i : i + size] for i in range(0, len(found) - size + 1, size)]
        assert len(epochs) >= 2 and all(len(set(epoch)) == size for epoch in epochs)
        assert all({*epoch} == {*epochs[0]} for epoch in epochs)
        if buffer > 1 and size > 20:
            assert epochs[0] != epochs[1]  # shuffled anew
        shares.append(epochs[0])
    everything = sorted(document for share in shares for document in share)
    assert everything == [(n,) * (n % 5 + 1) for n in range(1, 201)]
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 8


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=12), lanes=st.integers(1, 9))
def test_files_of_any_size_are_shared_out(counts, lanes, tmp_path_factory):
    folder, number = tmp_path_factory.mktemp("files"), 1
    for i, count in enumerate(counts):
        write(folder / f"{i:02}.jsonl", range(number, number + count), lambda number: 3)
        number += count
    dataset = StreamedDataset([str(folder)], TOKENIZER, 8)
    found = Counter()
    for lane in range(lanes):
        for source in dataset._sources:
            for piece in source.share(lane, lanes)[1]:
                found.update(row["text"] for _, row in sources.read(piece.item, ("text",), wanted=piece.holds))
    assert found == Counter({words(n, 3): 1 for n in range(1, number)})


def test_a_lane_opens_few_of_many_files(tmp_path):
    for i in range(64):
        write(tmp_path / f"{i:02}.jsonl", range(i * 10 + 1, i * 10 + 11))
    source = StreamedDataset([str(tmp_path)], TOKENIZER, 8)._sources[0]
    opened = [len(source.share(lane, 8)[1]) for lane in range(8)]
    assert max(opened) <= 10 and sum(opened) <= 64 + 8


@pytest.fixture
def read(monkeypatch):
    """The files that were begun to be read."""
    begun, real = [], sources._rows
    monkeypatch.setattr(sources, "_rows", lambda item, *more: begun.append(item) or real(item, *more))
    return begun


def test_lanes_of_a_process_read_a_file_together(tmp_path, read):
    path = write(tmp_path / "a.jsonl", range(1, 1900), lambda number: number % 30 + 1)
    dataset = streamed([path], length=8, shuffle_buffer=20)
    whole = batches(dataset, range(400), 8)
    assert len(read) == 1
    state = dataset.state_dict(range(8))
    whole += batches(dataset, range(400, 1200), 8)  # more than an epoch of 3900 * 8 tokens
    assert len(read) == 3 and dataset._lanes[0].at.epoch == 2
    resumed = streamed([path], length=8, shuffle_buffer=20)
    resumed.load_state_dict(state)
    assert batches(resumed, range(400, 800), 8) == whole[400:800] and len(read) <= 5


@pytest.mark.parametrize("patience", [0, 1])
def test_a_lane_too_far_behind_reads_alone(patience, texts, read, monkeypatch):
    whole = batches(streamed(texts), range(100), 4)
    together = len(read)
    monkeypatch.setattr("transpoint.distill.data.streaming.PATIENCE", patience)
    assert batches(streamed(texts), range(100), 4) == whole
    assert patience > 0 or len(read) - together > together


def test_slots_that_are_not_next_to_each_other(texts):
    whole, dataset = batches(streamed(texts), range(20), 5), streamed(texts)
    for step in range(20):
        assert rows_of(dataset.batch(step, 5, 0, range(0, 5, 3))) == [whole[step][0], whole[step][3]]


def test_sources_come_side_by_side_in_proportion_to_their_size(tmp_path):
    large, small = (
        write(tmp_path / "large.jsonl", range(1, 901), lambda number: 4),
        write(tmp_path / "small.jsonl", range(901, 1001), lambda number: 4),
    )
    rows = batches(streamed([large, small], length=10, shuffle_buffer=20), range(400), 1)
    order = [document[0] for document in documents([batch[0] for batch in rows])][:800]
    of_small = [sum(number > 900 for number in order[i : i + 200]) for i in range(0, 800, 200)]
    assert all(15 <= count <= 26 for count in of_small)


def test_text_files_are_documents_and_a_source_may_be_listed_twice(tmp_path):
    for i in range(1, 9):
        (tmp_path / f"{i}.txt").write_text(words(i, i))
    rows = batches(streamed([tmp_path], length=2), range(60), 4)
    found = {document for lane in range(4) for document in documents([batch[lane] for batch in rows])}
    assert found == {(i,) * i for i in range(1, 9)}
    rows = batches(streamed([tmp_path, tmp_path], length=2), range(44), 1)
    assert Counter(documents([batch[0] for batch in rows])) == Counter({(i,) * i: 2 for i in range(1, 9)})


def test_order_depends_on_the_seed_and_is_shuffled(tmp_path):
    path = write(tmp_path / "a.jsonl", range(1, 301), lambda number: 3)
    orders = []
    for seed in (0, 1):
        rows = batches(streamed([path], length=4, shuffle_buffer=100), range(290), 1, seed)
        orders.append([document[0] for document in documents([batch[0] for batch in rows])])
    assert orders[0] != orders[1]
    assert set(orders[0][:100]) == set(range(1, 101)) and orders[0][:100] != sorted(orders[0][:100])


# What an item is


def test_documents_follow_each_other_and_positions_restart(texts):
    rows = batches(streamed(texts, length=11), range(40), 3)
    for lane in range(3):
        windows = [batch[lane] for batch in rows]
        tokens = [token for window, _ in windows for token in window]
        expected, position = [], 0
        for offset in range(len(tokens)):
            begins = offset % 11 == 0 or tokens[offset - 1] == EOS
            position = 0 if begins else position + 1
            expected.append(position)
        assert [position for _, positions in windows for position in positions] == expected
        assert all(len(set(document)) == 1 and len(document) == document[0] % 5 + 1 for document in documents(windows))
    item = streamed(texts, length=11).batch(0, 1, 0, range(1))[0]
    assert {key: (value.dtype, value.shape) for key, value in item.items()} == {
        "input_ids": (torch.int64, (11,)),
        "position_ids": (torch.int64, (11,)),
    }


def test_a_document_longer_than_many_windows(tmp_path):
    path = write(tmp_path / "a.jsonl", [7, 8], lambda number: 1000)
    rows = batches(streamed([path], length=64), range(100), 1)
    assert set(documents([batch[0] for batch in rows])) == {(7,) * 1000, (8,) * 1000}


def test_spread_leaves_the_position_alone(texts):
    dataset, untouched = streamed(texts), streamed(texts)
    whole = batches(untouched, range(10), 4)
    first = batches(dataset, range(5), 4)
    items = rows_of(dataset.spread(6))
    assert first + batches(dataset, range(5, 10), 4) == whole
    assert len(items) == 6 and items == rows_of(streamed(texts).spread(6))
    assert len({tuple(ids) for ids, _ in items}) == 6
    assert dataset.tokens_per_item == 8


def test_spread_of_little_text_is_less_than_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", range(1, 11), lambda number: 7)  # 80 tokens
    assert len(streamed([path], length=8).spread(100)) == 10
    assert len(streamed([path], length=200).spread(3)) == 1


# The hub


@pytest.fixture
def hub(monkeypatch):
    """A hub dataset of three files with 60 documents; the calls to load_dataset are recorded."""
    calls, commit = [], ["abc"]

    def rows(shards):
        for shard in shards:
            for number in range(shard * 20 + 1, shard * 20 + 21):
                yield {"text": words(number, 3), "other": 1}

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "hub_commit", lambda name, revision, kind: commit[0])
    return calls, commit


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_hub_datasets_are_opened_once_and_shared_out(hub, lanes):
    dataset = streamed(["hub:o/n"])
    rows = batches(dataset, range(60 // lanes), lanes)
    found = [{*documents([batch[lane] for batch in rows])} for lane in range(lanes)]
    assert set().union(*found) == {(n,) * 3 for n in range(1, 61)}
    assert sum(map(len, found)) == 60
    assert hub[0] == [(("o/n", None), {"split": "train", "revision": "abc", "streaming": True})]


def test_hub_datasets_go_on_at_the_commit_they_began_with(hub):
    calls, commit = hub
    dataset = streamed(["hub:o/n"])
    whole = batches(dataset, range(25), 2)
    begun = streamed(["hub:o/n"])
    batches(begun, range(11), 2)
    state = begun.state_dict(range(2))
    commit[0] = "later"
    resumed = streamed(["hub:o/n"])
    resumed.load_state_dict(state)
    assert batches(resumed, range(11, 25), 2) == whole[11:]
    assert calls[-1][1]["revision"] == "abc"


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_hub_datasets_as_the_library_streams_them(form, hub, tmp_path, monkeypatch):
    files = []
    for i in range(3):
        name = f"{i}.{'parquet' if form == 'parquet' else 'jsonl'}"
        files.append(write(tmp_path / name, range(i * 20 + 1, i * 20 + 21)))

    def open_files(name, config, split, revision, streaming):
        builder = load_builder(form, data_files={"train": files}, cache_dir=str(tmp_path / "cache"))
        return builder.as_streaming_dataset(split=split)

    load_builder = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset", open_files)
    dataset = streamed(["hub:o/n"])
    whole = batches(dataset, range(60), 4)
    shares = [documents([batch[lane] for batch in whole]) for lane in range(4)]
    assert {document for share in shares for document in share} == {(n,) * (n % 5 + 1) for n in range(1, 61)}
    assert len(dataset._sources[0].items) == 3
    begun = streamed(["hub:o/n"])
    batches(begun, range(7), 4)
    resumed = streamed(["hub:o/n"])
    resumed.load_state_dict(begun.state_dict(range(4)))
    assert batches(resumed, range(7, 60), 4) == whole[7:]


def test_hub_that_cannot_be_reached(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'o/n' on the Hub (timeout)\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(sources, "hub_commit", lambda *of: "abc")
    with pytest.raises(DataError) as caught:
        streamed(["hub:o/n"])
    assert str(caught.value) == (
        "hub:o/n: reading failed after 0 rows (Couldn't reach 'o/n' on the Hub (timeout)): check the name and the "
        "network (a private dataset needs HF_TOKEN), or give a local file"
    )


# Readers go on anywhere


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "saved"])
@pytest.mark.parametrize("first", [0, 1, 6, 7, 29, 30, 31])
def test_readers_start_at_any_row_and_take_some(name, first, tmp_path):
    write(tmp_path / name, range(100, 130), lambda number: 1)
    [item] = sources.resolve(str(tmp_path / name))
    taken = [(number, row["text"]) for number, row in sources.read(item, ("text",), first, lambda n: n % 3 == 0)]
    assert taken == [(n, str(100 + n)) for n in range(30) if n >= first and n % 3 == 0]


# Errors


def message(call):
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_few_documents(tmp_path):
    path = write(tmp_path / "a.jsonl", [1, 2])
    assert message(lambda: batches(streamed([path]), [0], 8)) == (
        f"no document for sequence 1 of 8 in a batch: {path} holds too few; give more text, or set a smaller "
        "batch_size or data.streaming=false"
    )


@pytest.mark.parametrize("row", ['{"text": " "}', "not JSON", '{"other": "1"}'])
def test_no_usable_document(row, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{row}\n" * 40 + "{}\n")
    told = message(lambda: batches(streamed([path]), [0], 2))
    assert told.startswith(f"no document for sequence 0 of 2 in a batch: {path} holds too few (skipped ")


def test_documents_without_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr("transpoint.distill.data.rows.RowEncoder.encode", lambda self, texts: [([], []) for _ in texts])
    path = write(tmp_path / "a.jsonl", range(1, 9))
    assert "no tokens (first: sequence 0 of 1 in a batch)" in message(lambda: batches(streamed([path]), [0], 1))


def test_one_short_document_for_a_lane_fills_long_windows(tmp_path):
    path = write(tmp_path / "a.jsonl", [5], lambda number: 1)
    rows = batches(streamed([path], length=512), range(3), 1)
    assert all(ids == [5, EOS] * 256 for [(ids, _)] in rows)


def test_fields_of_other_names(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "FIELD_PATIENCE", 10)
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "1", "id": 2}\n' * 100)
    assert message(lambda: batches(streamed([path]), [0], 1)) == (
        f"{path}: no text or messages field in any of the 10 rows read; the first row has content, id: "
        "set data.text_field or data.messages_field"
    )
    assert streamed([path], text_field="content").batch(0, 1, 0, range(1))[0]["input_ids"].tolist() == [1, EOS] * 4


def test_skipped_rows_are_counted_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1 2 3"}\n{"text": ""}\n[1]\n{"text": "4"}\n')
    dataset = streamed([path], shuffle_buffer=100)
    dataset.batch(0, 1, 0, range(1))
    assert dataset.summary().startswith("streamed from 1 file; skipped ")
    assert "empty text (first: a.jsonl line 2)" in dataset.summary()
    assert streamed([path, path]).summary() == "streamed from 2 files"


def test_a_file_that_is_cut_off_says_so_when_it_is_reached(tmp_path):
    path = Path(write(tmp_path / "a.jsonl.zst", range(1, 1000)))
    path.write_bytes(path.read_bytes()[:-20])
    dataset = streamed([path], length=16, shuffle_buffer=1)
    told = message(lambda: batches(dataset, range(10_000), 1))
    assert told.startswith(f"{path}: reading failed after ") and told.endswith("fetch or write it again")


@pytest.mark.parametrize("change", ["another size", "another file", "length", "shuffle_buffer", "text_field"])
def test_a_position_in_other_text_is_refused(change, tmp_path):
    path = write(tmp_path / "a.jsonl", range(1, 50))
    dataset = streamed([path])
    dataset.batch(0, 2, 0, range(2))
    state = dataset.state_dict(range(2))
    if change == "another size":
        write(tmp_path / "a.jsonl", range(1, 51))
    paths = [path, write(tmp_path / "b.jsonl", range(50, 60))] if change == "another file" else [path]
    options = {"length": {"length": 9}, "shuffle_buffer": {"shuffle_buffer": 5}, "text_field": {"text_field": "x"}}
    other = streamed(paths, **options.get(change, {}))
    assert message(lambda: other.load_state_dict(state)) == (
        "the saved position is in other text than data.train holds now: restore the files, or run the stage anew "
        "with --from"
    )


def test_missing_sources(tmp_path):
    assert message(lambda: streamed([])).startswith("no sources of text: list files, folders or hub:OWNER/NAME")
    assert message(lambda: streamed([tmp_path / "a.jsonl"])).startswith("no such file or folder: ")
    path = write(tmp_path / "b.jsonl", [1])
    assert message(lambda: streamed([path], length=0)).startswith("data.length is 0, data.shuffle_buffer 4: give ")


# In a run


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, run_tiny, caplog):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = [f"{stage}.{key}" for stage in ("align", "distill") for key in ("steps=10", "checkpoint_every=4")]
    printed = run_tiny(whole, *STREAMED, *more, until_stage="distill")
    assert "train text: streamed from 1 file" in printed

    def stop(step):
        if step == 7:  # 3 after the checkpoint, and with batches made ahead
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tiny(cut, *STREAMED, *more, until_stage="align", on_step=stop)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(
            cut, *STREAMED, *more, until_stage="distill", on_step=lambda step: stop(step) if distilling(cut) else None
        )
    printed = run_tiny(cut, *STREAMED, *more, until_stage="distill")
    assert "distill: going on from step 4" in printed and "no position" not in caplog.text
    for stage in ("align", "distill"):
        assert student(cut, stage) == student(whole, stage) and metrics(cut, stage) == metrics(whole, stage)


def distilling(folder):
    return (folder / "distill" / "metrics.jsonl").exists()


def test_rows_that_were_skipped_are_told_of(tmp_path, run_tiny):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["A few words. " * 20, ""] * 40))
    printed = run_tiny(tmp_path / "run", *STREAMED, f"data.train=[{path}]", "align.steps=5", until_stage="align")
    assert "empty text (first: a.jsonl line " in printed.split("align")[-2]


def identities(*overrides):
    return stage_inputs(load_recipe(TINY, ["data.max_train_tokens=null", *overrides]))


def test_a_stage_depends_on_what_changes_its_training_alone(tmp_path):
    plain, other = identities(), identities("data.shuffle_buffer=7")
    assert plain == other and "streaming" not in plain["align"]["data"]
    streams = identities("data.streaming=true")
    assert streams["align"]["data"] != plain["align"]["data"]
    assert identities("data.streaming=true", "data.shuffle_buffer=7")["align"] != streams["align"]
    assert identities("data.streaming=true", f"data.cache={tmp_path}")["align"] == streams["align"]
    assert streams["evaluate"]["data"] == plain["evaluate"]["data"]


def test_large_files_are_known_by_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SAMPLES", 4)
    monkeypatch.setattr(sources, "SAMPLE", 10)
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(200)))
    whole, sampled = sources.source_identity(str(path)), sources.source_identity(str(path), sampled=True)
    assert whole != sampled
    for change in (0, 199, 190):
        path.write_bytes(bytes(0xFF if i == change else i for i in range(200)))
        assert sources.source_identity(str(path), sampled=True) != sampled
    path.write_bytes(bytes(range(201)))
    assert sources.source_identity(str(path), sampled=True) != sampled
    path.write_bytes(bytes(range(40)))  # no larger than its samples: all of it is read
    assert sources.source_identity(str(path)) == sources.source_identity(str(path), sampled=True)


@pytest.mark.parametrize("override", ["data.max_train_tokens=5", "distill.teacher_cache=somewhere"])
def test_what_streaming_does_not_go_with(override):
    key, value = override.split("=")
    with pytest.raises(ConfigError) as caught:
        load_recipe(TINY, ["data.max_train_tokens=null", "data.streaming=true", override])
    assert str(caught.value).startswith(f"{key} is {value}; expected null with data.streaming=true: ")


def test_documents_and_what_is_cut_off_of_them_begin_as_the_tokenizer_begins_a_text(tmp_path):
    path = write(tmp_path / "a.jsonl", range(1, 9), lambda number: 6)
    begins = copy.deepcopy(TOKENIZER)
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="1999 $A", special_tokens=[("1999", 1999)]
    )
    dataset = StreamedDataset([path], begins, 5, shuffle_buffer=1)
    found = [dataset.batch(step, 1, 0, range(1))[0] for step in range(12)]
    assert all(item["input_ids"][0] == 1999 and len(item["input_ids"]) == 5 for item in found)
    firsts = [number for item in found for number in item["input_ids"][item["position_ids"] == 0].tolist()]
    assert set(firsts) == {1999}
    kept = [number for item in found for number in item["input_ids"].tolist() if number not in (1999, EOS)]
    plain = StreamedDataset([path], begins, 5, shuffle_buffer=1, bos=False)
    expected = [n for step in range(12) for n in plain.batch(step, 1, 0, range(1))[0]["input_ids"].tolist() if n != EOS]
    assert len(kept) > 30 and kept == expected[: len(kept)]  # nothing is left out
    state = StreamedDataset([path], begins, 5, shuffle_buffer=1)
    state.batch(0, 1, 0, range(1))
    again = StreamedDataset([path], begins, 5, shuffle_buffer=1)
    again.load_state_dict(state.state_dict(range(1)))
    assert rows_of(again.batch(1, 1, 0, range(1))) == rows_of([found[1]])
