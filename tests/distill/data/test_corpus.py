"""Reading, tokenising, caching, packing and batching of text. No network: the hub is replaced."""

import gzip
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import given, settings, strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from run_files import ROOT
from transpoint.distill.data import corpus as data, rows, sources
from transpoint.distill.data.corpus import Corpus, tokenize_corpus
from transpoint.distill.data.packed import PackedDataset, batch_indices, collate
from transpoint.distill.data.sources import DataError
from transpoint.distill.settings import DataConfig

SAMPLE = ROOT / "configs" / "sample"
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
TEXTS = ["one two three", "a longer text, with four words and more", "line\u2028separator", "Émile 你好"]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "one two"}]


def make_tokenizer(eos="<eos>", template=TEMPLATE):
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=eos, chat_template=template)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def rows_of(texts):
    return [{"text": text, "other": 1} for text in texts]


def documents(corpus, tokenizer):
    ends = [*corpus.starts[1:].tolist(), len(corpus.tokens)]
    return [tokenizer.decode(corpus.tokens[a:b].tolist()) for a, b in zip(corpus.starts.tolist(), ends, strict=True)]


def message(*args, **kwargs):
    """The text of the DataError that tokenize_corpus raises; one line."""
    with pytest.raises(DataError) as caught:
        tokenize_corpus(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, form, texts):
    """Write `texts` to `path` in the given form and return it."""
    raw = jsonl(rows_of(texts))
    if form == "jsonl":
        path.write_bytes(raw)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(raw))
    elif form == "jsonl.zst":  # two frames, as tools that append make them
        half = raw.index(b"\n") + 1
        path.write_bytes(zstandard.compress(raw[:half]) + zstandard.compress(raw[half:]))
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of(texts)), path)
    elif form == "saved":
        datasets.Dataset.from_list(rows_of(texts)).save_to_disk(path)
    return path


# Formats and sources


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "saved"])
def test_every_row_format_gives_the_same_documents(form, tmp_path, tokenizer):
    path = write(tmp_path / f"rows.{form}", form, TEXTS)
    corpus = tokenize_corpus([str(path)], tokenizer)
    assert documents(corpus, tokenizer) == [text + "<eos>" for text in TEXTS]
    assert corpus.skipped == {} and corpus.documents == 4
    assert corpus.tokens.dtype == torch.uint16 and corpus.starts.dtype == torch.int64


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst", "A.TXT"])
def test_a_text_file_is_one_document(name, tmp_path, tokenizer):
    raw = "first line\nsecond\u2028line\n".encode("utf-8-sig")  # a byte order mark is not text
    (tmp_path / name).write_bytes(zstandard.compress(raw) if name.endswith("zst") else raw)
    corpus = tokenize_corpus([str(tmp_path / name)], tokenizer)
    assert documents(corpus, tokenizer) == ["first line\nsecond\u2028line\n<eos>"]


def test_lines_end_with_newline_only_and_span_pieces(tmp_path, tokenizer):
    texts = ["a\u2028b\u2029c\x85d\x0be", "x" * 300_000, "last"]  # the second is longer than one piece read
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(rows_of(texts)).replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    assert documents(tokenize_corpus([str(path)], tokenizer), tokenizer) == [text + "<eos>" for text in texts]


def test_globs_and_folders(tmp_path, tokenizer):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.jsonl", "jsonl", ["b"])
    write(tmp_path / "a.jsonl", "jsonl", ["a"])
    write(tmp_path / "deep" / "c.parquet", "parquet", ["c"])
    (tmp_path / "README.md").write_text("not a source")
    everything = tokenize_corpus([str(tmp_path)], tokenizer)
    assert documents(everything, tokenizer) == ["a<eos>", "b<eos>", "c<eos>"]
    matched = tokenize_corpus([str(tmp_path / "*.jsonl")], tokenizer)
    assert documents(matched, tokenizer) == ["a<eos>", "b<eos>"]
    deep = tokenize_corpus([str(tmp_path / "**" / "*.parquet"), str(tmp_path / "b.jsonl")], tokenizer)
    assert documents(deep, tokenizer) == ["c<eos>", "b<eos>"]


def test_other_fields_and_a_vocabulary_beyond_uint16(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(66_000)])
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"content": "one <65999>"}]))
    corpus = tokenize_corpus([str(tmp_path / "a.jsonl")], tokenizer, text_field="content")
    assert corpus.tokens.dtype == torch.int32 and corpus.tokens.max() > 65_535
    assert documents(corpus, tokenizer) == ["one <65999><eos>"]


def test_eos_is_added_once_and_only_if_there_is_one(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", "jsonl", ["done<eos>", "open"])
    assert documents(tokenize_corpus([str(path)], tokenizer), tokenizer) == ["done<eos>", "open<eos>"]
    without = make_tokenizer(eos=None)
    assert documents(tokenize_corpus([str(path)], without), without) == ["done<eos>", "open"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_chats_go_through_the_template(form, tmp_path, tokenizer):
    rows = [{"text": None, "messages": CHAT}, {"text": "plain", "messages": None}]
    rows += [{"text": "text wins", "messages": CHAT}]
    path = tmp_path / f"a.{form}"
    if form == "jsonl":
        path.write_bytes(jsonl(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    corpus = tokenize_corpus([str(path)], tokenizer)
    chat = "<|user|>hello<eos><|assistant|>one two<eos>"
    assert documents(corpus, tokenizer) == [chat, "plain<eos>", "text wins<eos>"]


def test_token_limit_is_exact_and_names_what_was_not_read(tmp_path, tokenizer):
    first, second = (str(write(tmp_path / f"{n}.jsonl", "jsonl", TEXTS)) for n in "ab")
    whole = tokenize_corpus([first, second], tokenizer)
    for limit in (1, 7, len(whole.tokens) // 2, len(whole.tokens) - 1):
        cut = tokenize_corpus([first, second], tokenizer, max_tokens=limit)
        assert len(cut.tokens) == limit and torch.equal(cut.tokens, whole.tokens[:limit])
        assert torch.equal(cut.starts, whole.starts[whole.starts < limit])
    cut = tokenize_corpus([first, second], tokenizer, max_tokens=7)
    assert cut.unread == [second] and cut.summary().endswith(f"token limit reached before {second}")
    assert whole.unread == []
    assert len(tokenize_corpus([first], tokenizer, max_tokens=10**9).tokens) == len(whole.tokens) // 2


def test_reading_stops_at_the_token_limit(tmp_path, tokenizer, monkeypatch):
    """Nothing past the batch that reaches the limit is read."""
    paths = [str(write(tmp_path / f"{n}.jsonl", "jsonl", ["one two three " * 143_000])) for n in "ab"]
    Path(paths[1]).write_bytes(b"\n")
    read = []
    real = sources._rows
    monkeypatch.setattr(sources, "_rows", lambda item, *more: read.append(item.path.name) or real(item, *more))
    tokenize_corpus(paths, tokenizer, max_tokens=10)
    assert read == ["a.jsonl"]


# The hub


@pytest.fixture
def hub(monkeypatch):
    """A hub of one dataset; the calls to load_dataset are recorded."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(rows_of(TEXTS)).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "hub_commit", lambda name, revision, kind: {None: "abc"}.get(revision, revision))
    return calls


@pytest.mark.parametrize(
    "source, config, split",
    [
        ("hub:o/n", None, "train"),
        ("hub:o/n:test", None, "test"),
        ("hub:o/n:small:test", "small", "test"),
        ("hub:o/n@v2", None, "train"),
        ("hub:o/n@refs/pr/1:small:test", "small", "test"),
    ],
)
def test_hub_datasets_stream_at_a_pinned_commit(source, config, split, hub, tokenizer):
    corpus = tokenize_corpus([source], tokenizer)
    assert documents(corpus, tokenizer) == [text + "<eos>" for text in TEXTS]
    revision = source.partition("@")[2].partition(":")[0] or "abc"
    assert hub == [(("o/n", config), {"split": split, "revision": revision, "streaming": True})]


def test_hub_cache_follows_the_commit(hub, tokenizer, tmp_path, monkeypatch):
    first = tokenize_corpus(["hub:o/n"], tokenizer, cache=tmp_path)
    again = tokenize_corpus(["hub:o/n"], tokenizer, cache=tmp_path)
    assert len(hub) == 1 and first.fingerprint == again.fingerprint
    assert tokenize_corpus(["hub:o/n@abc"], tokenizer, cache=tmp_path).fingerprint == first.fingerprint
    monkeypatch.setattr(sources, "hub_commit", lambda *of: "later")
    assert tokenize_corpus(["hub:o/n"], tokenizer, cache=tmp_path).fingerprint != first.fingerprint


def test_hub_that_cannot_be_reached(monkeypatch, tokenizer):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'o/n' on the Hub (timeout)\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(sources, "hub_commit", lambda *of: "abc")
    assert message(["hub:o/n"], tokenizer) == (
        "hub:o/n: reading failed after 0 rows (Couldn't reach 'o/n' on the Hub (timeout)): check the name and the "
        "network (a private dataset needs HF_TOKEN), or give a local file"
    )


@pytest.mark.parametrize("source", ["hub:", "hub:a/b:c:d:e", "hub:a/b:", "hub:a/b@", "hub:@v2"])
def test_hub_sources_of_another_form(source, tokenizer):
    assert message([source], tokenizer).startswith(f"{source} is not hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or")


# Skipped rows


def test_every_unusable_row_is_counted_with_its_place(tmp_path, tokenizer):
    lines = [
        b'{"text": "good"}',
        b'{"text": ""}',
        b"",  # blank lines are no rows
        b'{"text": " \\n"}',
        b'{"text": "\xff\xfe"}',
        b'{"text": "cut o',
        b'["a", "list"]',
        b'{"content": "other"}',
        b'{"text": 5}',
        b'{"text": "half a pair \\ud800"}',
        b'{"messages": "hello"}',
        b'{"messages": [{"role": "user"}]}',
        b'{"messages": []}',
        b'{"text": null}',
        b"[" * 100_000,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\xff\xff")
    strict = make_tokenizer(template="{% for m in messages %}{{ m.content + '' }}{% endfor %}")
    corpus = tokenize_corpus([str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")], strict)
    assert documents(corpus, strict) == ["good<eos>"]
    assert corpus.skipped == {
        "empty text": 4,
        "not valid UTF-8": 3,
        "not valid JSON": 2,
        "not a JSON object": 1,
        "no text or messages field": 1,
        "text is not a string": 1,
        "messages is not a list": 1,
        "chat template failed": 1,
    }
    places = corpus.examples_of_skipped
    assert places["empty text"] == "a.jsonl line 2"
    assert places["not valid UTF-8"].startswith("a.jsonl line 5: 'utf-8' codec can't decode byte 0xff")
    assert places["not valid JSON"].startswith("a.jsonl line 6: Unterminated string")
    assert places["no text or messages field"] == "a.jsonl line 8"
    assert places["chat template failed"].startswith("a.jsonl line 12: ")
    assert corpus.summary().startswith("1 documents, 5 tokens; skipped 14: 4 empty text (first: a.jsonl line 2), 3 not")


def test_undecodable_parquet_values_are_skipped(tmp_path, tokenizer):
    raw = pyarrow.array([b"good", b"\xff", None, b"fine"], pyarrow.binary())
    as_text = raw.view(pyarrow.string())  # unchecked, as a careless writer leaves it
    for name, column in {"bytes.parquet": raw, "text.parquet": as_text}.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / name)
        corpus = tokenize_corpus([str(tmp_path / name)], tokenizer)
        assert documents(corpus, tokenizer) == ["good<eos>", "fine<eos>"]
        assert corpus.skipped == {"not valid UTF-8": 1, "empty text": 1}
        assert corpus.examples_of_skipped["empty text"] == f"{name} row 3"


# Errors


def test_no_sources(tokenizer):
    assert message([], tokenizer) == (
        "no sources of text: list files, folders or hub:OWNER/NAME under data.train and data.heldout"
    )


@pytest.mark.parametrize("limit", [0, -1])
def test_token_limit_must_be_positive(limit, tokenizer):
    expected = f"the token limit is {limit}: give a positive number, or null to read everything"
    assert message([str(SAMPLE)], tokenizer, max_tokens=limit) == expected


def test_missing_files(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl.zst", "jsonl.zst", TEXTS)
    missing = str(tmp_path / "train.jsonl")
    assert message([missing], tokenizer) == f"no such file or folder: {missing}; did you mean {missing}.zst?"
    assert message(["owner/name"], tokenizer) == (
        "no such file or folder: owner/name; a hub dataset is written hub:OWNER/NAME"
    )
    pattern = str(tmp_path / "*.parquet")
    told = message([pattern], tokenizer)
    assert told == f"no file matches {pattern}: check the pattern and the folder it starts from"


def test_unsupported_files(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("a,b")
    kinds = ".jsonl, .jsonl.zst, .jsonl.gz, .parquet, .txt, .txt.zst"
    path = tmp_path / "a.csv"
    assert message([str(path)], tokenizer) == f"{path} is of an unsupported kind; supported are {kinds}"
    assert message([str(tmp_path)], tokenizer) == f"folder {tmp_path} holds no file of a supported kind ({kinds})"


def test_saved_dataset_with_splits(tmp_path, tokenizer):
    one = datasets.Dataset.from_list(rows_of(TEXTS))
    path = tmp_path / "d"
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(path)
    assert message([str(path)], tokenizer) == (
        f"{path} is a saved dataset with the splits test, train: name one of them, as {path}/SPLIT"
    )
    assert tokenize_corpus([f"{path}/test"], tokenizer).documents == 4


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
def test_fields_of_other_names(form, tmp_path, tokenizer):
    path = tmp_path / f"a.{form}"
    rows = [{"content": "x", "id": 1}, {"content": "y", "id": 2}]
    if form == "jsonl":
        path.write_bytes(jsonl(rows))
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    good = str(write(tmp_path / "good.jsonl", "jsonl", TEXTS))  # another source does not hide it
    assert message([good, str(path)], tokenizer) == (
        f"{path}: no text or messages field in any of the 2 rows read; the first row has content, id: "
        "set data.text_field or data.messages_field"
    )


def test_a_long_source_without_the_field_is_given_up_early(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(rows, "FIELD_PATIENCE", 3)
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"content": "x"}] * 10))
    assert "in any of the 3 rows read" in message([str(tmp_path / "a.jsonl")], tokenizer)


def test_nothing_usable(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": ""}\n{"text": "\xff"}\n{"text": " "}\n')
    told = message([str(path)], tokenizer)
    assert told.startswith(
        f"no usable document in {path}: skipped 3: 2 empty text (first: a.jsonl line 1), 1 not valid UTF-8 (first: a"
    )
    path.write_bytes(b"")
    assert message([str(path)], tokenizer) == f"no usable document in {path}: there are no rows"


@pytest.mark.parametrize("form", ["jsonl.gz", "jsonl.zst", "parquet", "saved"])
def test_truncated_files(form, tmp_path, tokenizer):
    path = write(tmp_path / f"a.{form}", form, [f"{i} {i * i} some text" for i in range(3000)])
    victim = next(path.glob("*.arrow")) if form == "saved" else path
    victim.write_bytes(victim.read_bytes()[: -(victim.stat().st_size // 3)])
    told = message([str(path)], tokenizer)
    assert told.startswith(f"{path}: reading failed after ")
    assert told.endswith("): it may be truncated or damaged; fetch or write it again")
    if form.startswith("jsonl"):
        assert int(told.split(" after ")[1].split(" rows")[0].replace(",", "")) > 0


@pytest.mark.parametrize("form", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_files_that_are_something_else(form, tmp_path, tokenizer):
    (tmp_path / f"a.{form}").write_bytes(b"not what the name says" * 10)
    assert "reading failed after 0 rows" in message([str(tmp_path / f"a.{form}")], tokenizer)


def test_chats_without_a_template(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"messages": CHAT}]))
    assert message([str(tmp_path / "a.jsonl")], make_tokenizer(template=None)) == (
        "rows hold chats (messages) but the tokenizer has no chat template: use an instruction-tuned teacher's "
        "tokenizer, set its chat_template, or give rows with plain text"
    )


def test_cache_that_cannot_be_written(tmp_path, tokenizer):
    path = str(write(tmp_path / "a.jsonl", "jsonl", TEXTS))
    told = message([path], tokenizer, cache=path)
    assert told.startswith(f"cannot write tokenised text to {path} (") and told.endswith("): set data.cache")


# The cache


@pytest.fixture
def counted(monkeypatch):
    """Counts the calls that tokenise."""
    calls = []
    real = PreTrainedTokenizerFast.__call__

    def call(self, *args, **kwargs):
        calls.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", call)
    return calls


def equal(a: Corpus, b: Corpus) -> bool:
    same = torch.equal(a.tokens, b.tokens) and a.tokens.dtype == b.tokens.dtype and torch.equal(a.starts, b.starts)
    return same and a.fingerprint == b.fingerprint and a.summary() == b.summary()


def test_the_second_call_does_not_tokenise(tmp_path, tokenizer, counted):
    path = write(tmp_path / "a.jsonl", "jsonl", [*TEXTS, ""])
    cache = tmp_path / "cache"
    first = tokenize_corpus([str(path)], tokenizer, cache=cache)
    assert counted == [1]
    second = tokenize_corpus([str(path)], make_tokenizer(), cache=cache)
    moved = tokenize_corpus([str(path.rename(tmp_path / "b.jsonl"))], tokenizer, cache=cache)
    assert counted == [1] and equal(first, second) and equal(first, moved)
    assert sorted(p.suffix for p in cache.iterdir()) == [".json", ".safetensors"]
    facts = json.loads(next(cache.glob("*.json")).read_text())
    assert facts["documents"] == 4 and facts["tokens"] == len(first.tokens) and facts["sources"] == [str(path)]


def test_what_changes_the_tokens_is_tokenised_again(tmp_path, counted):
    path = write(tmp_path / "a.jsonl", "jsonl", TEXTS)
    cache = tmp_path / "cache"

    def fingerprint(tokenizer=None, sources=(path,), **options):
        sources = [str(p) for p in sources]
        return tokenize_corpus(sources, tokenizer or make_tokenizer(), cache=cache, **options).fingerprint

    seen = {fingerprint()}
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_padding()  # calls leave such settings behind
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert fingerprint(tokenizer) in seen and len(counted) == 1
    more = make_tokenizer()
    more.add_tokens(["three"])
    seen |= {fingerprint(t) for t in (make_tokenizer(template=TEMPLATE + " "), make_tokenizer(eos=None), more)}
    seen |= {fingerprint(max_tokens=5), fingerprint(messages_field="chat"), fingerprint(sources=(path, path))}
    path.write_bytes(path.read_bytes().replace(b"three", b"THREE"))
    seen |= {fingerprint(), fingerprint(sources=[path.rename(tmp_path / "a.txt")])}
    assert len(seen) == len(counted) == 9


@pytest.mark.parametrize("damage", ["truncated tensors", "flipped bit", "no tensors", "truncated facts", "other facts"])
def test_a_damaged_cache_is_reported_and_rebuilt(damage, tmp_path, tokenizer, counted, caplog):
    path = str(write(tmp_path / "a.jsonl", "jsonl", TEXTS))
    cache = tmp_path / "cache"
    first = tokenize_corpus([path], tokenizer, cache=cache)
    first = replace(first, tokens=first.tokens.clone(), starts=first.starts.clone())  # the file is mapped
    tensors, facts = next(cache.glob("*.safetensors")), next(cache.glob("*.json"))
    if damage == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    elif damage == "flipped bit":
        raw = bytearray(tensors.read_bytes())
        raw[-1] ^= 1
        tensors.write_bytes(raw)
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "truncated facts":
        facts.write_bytes(facts.read_bytes()[:40])
    else:
        facts.write_text("{}")
    with caplog.at_level(logging.WARNING):
        second = tokenize_corpus([path], tokenizer, cache=cache)
    assert len(counted) == 2 and equal(first, second)
    assert len(caplog.records) == 1 and caplog.messages[0].startswith(f"tokenised text in {tensors} is damaged (")
    third = tokenize_corpus([path], tokenizer, cache=cache)
    assert len(counted) == 2 and equal(first, third)


def test_a_cached_corpus_is_mapped_not_read(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", "jsonl", ["one two three " * 20_000])
    cached = tokenize_corpus([str(path)], tokenizer, cache=tmp_path / "cache")
    assert any("cache" in line and ".safetensors" in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert torch.equal(cached.tokens, tokenize_corpus([str(path)], tokenizer).tokens)


def test_a_cache_that_does_not_fit_the_disk(tmp_path, tokenizer, monkeypatch):
    path = str(write(tmp_path / "a.jsonl", "jsonl", TEXTS))
    cache = tmp_path / "cache"

    def full(*args):
        raise data.safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(data.safetensors.torch, "save_file", full)
    assert message([path], tokenizer, cache=cache) == (
        f"cannot write tokenised text to {cache} (I/O error: No space left on device (os error 28)): set data.cache"
    )
    assert list(cache.iterdir()) == []


def test_hashes_of_large_files_are_remembered_until_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sources, "REMEMBERED_FROM", 10)
    read, real = [], sources.hashlib.file_digest
    monkeypatch.setattr(sources.hashlib, "file_digest", lambda *args: read.append(1) or real(*args))
    path = tmp_path / "a.txt"
    path.write_text("x" * 100)
    first = sources.file_hash(path)
    assert sources.file_hash(path) == first and len(read) == 2  # it was written just now, and may be again
    now = sources.time.time_ns
    monkeypatch.setattr(sources.time, "time_ns", lambda: now() + 10**10)
    assert {sources.file_hash(path) for _ in range(3)} == {first} and len(read) == 3
    before = path.stat()
    path.write_text("y" * 100)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sources.file_hash(path) != first and len(read) == 4
    (tmp_path / "home" / "transpoint" / "hashes.json").write_text("[damaged")
    assert sources.file_hash(path) != first and len(read) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # cannot be written
    assert sources.file_hash(path) != first


# Packing and batching


@st.composite
def corpora(draw):
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=12))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    tokens = torch.arange(sum(lengths)) + draw(st.integers(0, 65_000))
    return Corpus(tokens.to(torch.uint16), torch.tensor(starts), "")


@settings(max_examples=60, deadline=None)
@given(corpora(), st.integers(1, 15))
def test_windows_give_the_tokens_back_and_positions_restart(corpus, length):
    if len(corpus.tokens) < length:
        with pytest.raises(DataError, match="less than one sequence"):
            PackedDataset(corpus, length)
        return
    packed = PackedDataset(corpus, length)
    assert len(packed) == len(corpus.tokens) // length and packed.tokens_per_item == length
    windows = collate([packed[i] for i in range(len(packed))])
    ids, positions = windows["input_ids"], windows["position_ids"]
    assert ids.shape == positions.shape == (len(packed), length) and ids.dtype == positions.dtype == torch.int64
    assert torch.equal(ids.flatten(), corpus.tokens[: ids.numel()].long())
    starts = {*corpus.starts.tolist(), *range(0, ids.numel(), length)}
    expected, position = [], 0
    for offset in range(ids.numel()):
        position = 0 if offset in starts else position + 1
        expected.append(position)
    assert positions.flatten().tolist() == expected
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_packing_errors():
    corpus = Corpus(torch.zeros(1000, dtype=torch.uint16), torch.tensor([0]), "")
    with pytest.raises(DataError) as caught:
        PackedDataset(corpus, 1024)
    assert str(caught.value) == (
        "the text has 1,000 tokens, less than one sequence of 1,024: set a shorter length or give more text"
    )
    with pytest.raises(DataError, match="data.length is 0: give a positive number of tokens"):
        PackedDataset(corpus, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 2**63), st.integers(1, 12))
def test_batches_visit_every_item_once_per_epoch(n_items, batch_size, seed, steps):
    forward = [batch_indices(n_items, batch_size, seed, step) for step in range(steps)]
    backward = [batch_indices(n_items, batch_size, seed, step) for step in reversed(range(steps))]
    assert forward == backward[::-1]  # no state: any step can come first
    assert all(len(batch) == batch_size for batch in forward)
    stream = [index for batch in forward for index in batch]
    for epoch in range(len(stream) // n_items):
        assert sorted(stream[epoch * n_items : (epoch + 1) * n_items]) == list(range(n_items))


def test_batches_differ_by_seed_and_epoch_and_refuse_nonsense():
    assert batch_indices(100, 100, 0, 0) != batch_indices(100, 100, 1, 0)
    assert batch_indices(100, 100, 0, 0) != batch_indices(100, 100, 0, 1)
    for arguments in [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, -1)]:
        with pytest.raises(ValueError, match="must be positive, step=.* at least 0"):
            batch_indices(*arguments)


# What ships with the project


def test_config_documents_every_field_and_suits_omegaconf():
    for name, option in DataConfig.__dataclass_fields__.items():
        assert option.metadata.get("help"), name
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), {"train": ["a.txt"], "max_train_tokens": 5})
    assert config.train == ["a.txt"] and config.cache is None and config.length == 1024


@pytest.mark.slow
def test_the_sample_loads_and_is_free(tokenizer):
    rows = {}
    for name in ("train", "heldout"):
        raw = zstandard.ZstdDecompressor().decompress((SAMPLE / f"{name}.jsonl.zst").read_bytes())
        rows[name] = [json.loads(line) for line in raw.split(b"\n") if line]
        assert all(set(row) == {"text", "source", "license"} for row in rows[name])
        assert {row["license"] for row in rows[name]} <= {"CC0-1.0 / public domain", "public domain"}
        corpus = tokenize_corpus([str(SAMPLE / f"{name}.jsonl.zst")], tokenizer)
        assert corpus.documents == len(rows[name]) and not corpus.skipped
    assert {row["source"] for row in rows["train"]} == {row["source"] for row in rows["heldout"]}
    paragraphs = {
        name: {line.strip() for row in rows[name] for line in row["text"].split("\n") if len(line.strip()) > 80}
        for name in rows
    }
    assert not paragraphs["train"] & paragraphs["heldout"]
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 2_000_000


# How a document begins


def with_bos(**kwargs):
    """A tokenizer that begins texts with a token of its own, as `generate` takes them."""
    tokenizer = make_tokenizer(**kwargs)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    number = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", number)]
    )
    return tokenizer


def test_texts_begin_as_the_tokenizer_begins_one(tmp_path):
    tokenizer = with_bos(template="{{ bos_token }}" + TEMPLATE)
    own = "<bos>one that begins so already"
    rows = [*rows_of([*TEXTS, own]), {"messages": CHAT}]
    path = str(write(tmp_path / "a.jsonl", "jsonl", [row.get("text") for row in rows[:-1]]))
    chat = tmp_path / "chat.jsonl"
    chat.write_bytes(jsonl(rows[-1:]))
    corpus = tokenize_corpus([path, str(chat)], tokenizer)
    wanted = [f"<bos>{text}<eos>" for text in TEXTS] + [
        f"{own}<eos>",
        "<bos><|user|>hello<eos><|assistant|>one two<eos>",
    ]
    assert documents(corpus, tokenizer) == wanted
    for i, text in enumerate(TEXTS):
        first = corpus.starts[i]
        assert corpus.tokens[first : corpus.starts[i + 1] - 1].tolist() == tokenizer(text)["input_ids"]
    plain = tokenize_corpus([path, str(chat)], tokenizer, bos=False)
    assert documents(plain, tokenizer) == [text.removeprefix("<bos>") for text in wanted[:4]] + wanted[4:]
    assert plain.fingerprint != corpus.fingerprint
    assert tokenize_corpus([path, str(chat)], make_tokenizer(template=TEMPLATE)).begin == []


def test_a_tokenizer_that_begins_nothing_has_the_caches_it_had(tmp_path, tokenizer):
    path = str(write(tmp_path / "a.jsonl", "jsonl", TEXTS))
    both = [tokenize_corpus([path], tokenizer, bos=bos) for bos in (True, False)]
    assert both[0].fingerprint == both[1].fingerprint and equal(*both)


def test_a_window_inside_of_a_document_begins_as_one(tmp_path):
    tokens, starts = torch.arange(10, 40), torch.tensor([0, 3, 22])
    dataset = PackedDataset(Corpus(tokens, starts, "", begin=[7]), 10)
    plain = PackedDataset(Corpus(tokens, starts, ""), 10)
    assert dataset[0]["input_ids"].equal(plain[0]["input_ids"])  # it begins with a document
    assert dataset[0]["position_ids"].equal(plain[0]["position_ids"])
    assert dataset[1]["input_ids"].tolist() == [7, *range(20, 29)]
    assert dataset[1]["position_ids"].tolist() == list(range(10))
    assert dataset[2]["input_ids"].tolist() == [7, *range(30, 39)]
    assert dataset[2]["position_ids"].tolist() == [0, 1, 2, *range(7)]
    assert PackedDataset(Corpus(tokens, starts, "", begin=[7]), 1)[5]["input_ids"].tolist() == [15]


@pytest.mark.parametrize("window_log", [20, 27, 28, 31])
def test_a_frame_of_zstd_may_ask_for_a_long_window(window_log, tmp_path, tokenizer):
    block = b'{"text": "one"}\n{"text": "two"}\n'
    # A frame of one block that is not compressed, as RFC 8878 has it, after one that is to be skipped.
    frame = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"any"
    frame += (0xFD2FB528).to_bytes(4, "little") + bytes([0, (window_log - 10) << 3])
    frame += (1 | len(block) << 3).to_bytes(3, "little") + block
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(frame + zstandard.compress(b'{"text": "three"}\n'))
    assert tokenize_corpus([str(path)], tokenizer).documents == 3
    path.write_bytes(frame[:-4])
    assert "it may be truncated or damaged" in message([str(path)], tokenizer)
