"""Pseudo-labels: text that the teacher itself samples, as a dataset that `data.train` can list.

    OUT/data.jsonl.zst     a row for each sample: {"text" or "messages", "prompt", "source"}
    OUT/synthesis.json     everything the text depends on (teacher, seed, settings, prompts), versions, counts, SHA-256
    OUT/.data.jsonl.zst    the rows so far, while it samples: a zstd frame for each batch

Batch b is sampled with a seed of its own from its own prompts: the same seed and settings give the same text, whether
or not it was interrupted, on any number of processes.
"""

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import zstandard
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Recipe
from ..errors import RunError
from ..models import embedding_rows, generated, generating
from ..run.files import read_json, sha256, write_json
from ..run.identity import file_identity, model_files
from ..run.progress import Progress
from ..tokenizers import beginning, decoded
from .rows import check_tokens
from .sources import DataError, place, read, resolve, source_identity

_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for a question, to find where the template puts it


@dataclass(frozen=True)
class Prompt:
    """What a sample starts from. ids: tokens to go on from. messages: the chat so far, None for plain text."""

    ids: list[int]
    text: str
    source: str
    messages: list[dict] | None = None
    asks: bool = False  # the teacher is to write the user's question first, then its answer


def synthesize(
    recipe: Recipe,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    console: Console,
) -> dict:
    """Samples what is still missing of `synthesize.samples`, and returns the record in synthesis.json.

    Without `synthesize.prompts` a sample starts from the tokenizer's beginning of text; with `chat` from the beginning
    of the user's turn in the chat template, so that the teacher writes both question and answer (Magpie, Xu et al.
    2024, arXiv 2406.08464, section 2). With prompts, texts are continued, or asked as questions with `chat`, and chats
    are answered after their last question.

    Raises:
        RunError: the folder holds other text, or the disk is full: what was sampled stays, and the same call goes on.
        DataError: there is no usable prompt, or one with a token that the teacher has no embedding for.
    """
    settings = recipe.synthesize
    folder = Path(settings.out or Path(recipe.run.dir) / "synthetic")
    main = accelerator.is_main_process
    with accelerator.main_process_first():
        record = _begin(folder, recipe, beginning(tokenizer) if recipe.data.bos else [], write=main)
    if record["sha256"]:
        console.print(f"{folder}: sampled before", highlight=False, markup=False, soft_wrap=True)
        return record
    prompts = _prompts(recipe, tokenizer, record["skipped_prompts"])
    _check_length(prompts, recipe, teacher)
    batches = -(-settings.samples // settings.batch_size)
    sampler = _Sampler(teacher, tokenizer, recipe)
    with Progress(console, "synthesize", settings.samples, record["sampled"], settings.max_new_tokens) as progress:
        for first in range(record["batches"], batches, accelerator.num_processes):
            mine, found = first + accelerator.process_index, []
            if mine < batches:
                numbers = range(mine * settings.batch_size, min(settings.samples, (mine + 1) * settings.batch_size))
                found = [sampler.rows(mine, [prompts[number % len(prompts)] for number in numbers])]
            found = gather_object(found)
            record["batches"] += len(found)
            for rows, counts in found:
                record["rows"] += len(rows)
                for name, count in counts.items():
                    record[name] += count
            if main:
                _append(folder, record, [rows for rows, _ in found])
            progress.show(record["sampled"])
    if main:
        _finish(folder, record)
    accelerator.wait_for_everyone()
    return read_json(folder / "synthesis.json")


def describe(folder: str | Path, record: dict) -> str:
    """One line for people."""
    return (
        f"{Path(folder) / 'data.jsonl.zst'}: {record['rows']:,} rows, {record['tokens']:,} tokens sampled; "
        f"{record['cut']:,} ended at synthesize.max_new_tokens, {record['empty']:,} were empty and left out"
    )


class _Sampler:
    """The teacher, with no settings of generation but the recipe's."""

    def __init__(self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe):
        self.teacher, self.tokenizer, self.recipe = teacher, tokenizer, recipe
        ends = teacher.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if tokenizer.eos_token_id is not None:
            ends = sorted({*ends, tokenizer.eos_token_id})
        self.ends = ends
        self.pad = 0  # any will do, unattended and cut off; the tokenizer's own may lack an embedding

    def rows(self, batch: int, prompts: list[Prompt]) -> tuple[list[dict], dict[str, int]]:
        """The rows of a batch, and counts."""
        mixed = hashlib.sha256(f"{self.recipe.run.seed} {batch}".encode()).digest()
        device = self.teacher.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(mixed[:7], "little"))
            counts = {"sampled": len(prompts), "tokens": 0, "cut": 0, "empty": 0}
            if prompts[0].asks:  # all of them do
                asked = [self._asked(ids, prompts[0].source) for ids in self._continued(prompts, counts)]
                counts["empty"] += sum(prompt is None for prompt in asked)
                prompts = [prompt for prompt in asked if prompt is not None]
                counts["cut"] = 0  # a question that was cut is asked as it is
            rows = []
            for prompt, ids in zip(prompts, self._continued(prompts, counts), strict=True):
                new = self._decode(ids)
                if not new.strip():
                    counts["empty"] += 1
                    continue
                row: dict[str, Any] = {"prompt": prompt.text, "source": prompt.source}
                if prompt.messages is None:
                    row = {"text": self._decode(prompt.ids + ids)} | row
                else:
                    row = {"messages": [*prompt.messages, {"role": "assistant", "content": new.strip()}]} | row
                rows.append(row)
        return rows, counts

    def _asked(self, ids: list[int], source: str) -> Prompt | None:
        question = self._decode(ids).strip()
        return _chat([{"role": "user", "content": question}], self.tokenizer, source) if question else None

    @torch.no_grad()
    def _continued(self, prompts: list[Prompt], counts: dict[str, int]) -> list[list[int]]:
        """The new tokens of each prompt, without the one that ends it."""
        if not prompts:
            return []
        rows = embedding_rows(self.teacher)
        for prompt in prompts:
            check_tokens(prompt.ids, rows, self.tokenizer, prompt.source)
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.tensor([[self.pad] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts])
        attended = torch.tensor([[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts])
        device, settings = self.teacher.device, self.recipe.synthesize
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": settings.temperature}
            sampling |= {"top_k": settings.top_k, "top_p": settings.top_p}
        sampling |= {"eos_token_id": self.ends or None, "pad_token_id": self.pad}
        with generating(self.teacher, max_new_tokens=settings.max_new_tokens, **sampling):
            output = generated(self.teacher, input_ids=ids.to(device), attention_mask=attended.to(device))
        found = []
        for row in output[:, width:].tolist():
            end = next((place for place, token in enumerate(row) if token in self.ends), None)
            counts["cut"] += end is None
            counts["tokens"] += len(row) if end is None else end + 1
            found.append(row[:end])
        return found

    def _decode(self, ids: list[int]) -> str:
        return decoded(self.tokenizer, ids, clean_up_tokenization_spaces=False)


def _prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, skipped: dict[str, int]) -> list[Prompt]:
    """At most as many as samples; what cannot be used is counted in `skipped`."""
    settings, data = recipe.synthesize, recipe.data
    if settings.chat and not tokenizer.chat_template:
        raise DataError("synthesize.chat is true but the tokenizer has no chat template: set it to false")
    if not settings.prompts:
        return [_question(tokenizer) if settings.chat else _beginning(tokenizer)]
    skipped.clear()
    found: list[Prompt] = []
    for item in (item for source in settings.prompts for item in resolve(source)):
        for number, row in read(item, (data.text_field, data.messages_field)):
            prompt = _prompt(row, place(item, number), recipe, tokenizer)
            if isinstance(prompt, str):
                skipped[prompt] = skipped.get(prompt, 0) + 1
                continue
            found.append(prompt)
            if len(found) == settings.samples:
                return found
    if not found:
        why = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items()) or "there are no rows"
        raise DataError(f"no usable prompt in {', '.join(settings.prompts)}: {why}")
    return found


def _prompt(row, source: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prompt | str:
    """The prompt in a row, or why there is none."""
    settings, data = recipe.synthesize, recipe.data
    if not isinstance(row, dict):
        return row.reason
    text = row.get(data.text_field)
    messages: Any = row.get(data.messages_field)
    if isinstance(text, str) and text.strip():
        if not settings.chat:
            begin = beginning(tokenizer) if data.bos else []
            ids = begin + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = ids[: settings.max_prompt_tokens]
            return Prompt(ids, decoded(tokenizer, ids), source)
        messages = [{"role": "user", "content": text}]
    try:
        questions = [number for number, message in enumerate(messages) if message["role"] == "user"]
        prompt = _chat(messages[: questions[-1] + 1], tokenizer, source)
    except Exception:  # anything may be in a row, and a template is code of its own
        return "neither text nor a chat with a question that the chat template takes"
    return prompt if len(prompt.ids) <= settings.max_prompt_tokens else "longer than synthesize.max_prompt_tokens"


def _chat(messages: list[dict], tokenizer: PreTrainedTokenizerBase, source: str) -> Prompt:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Prompt(ids, messages[-1]["content"], source, messages)


def _question(tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The beginning of the user's turn, as the chat template writes it."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    begin = cast(str, text).partition(_MARK)[0]
    return Prompt(tokenizer(begin, add_special_tokens=False)["input_ids"], "", "chat template", asks=True)


def _beginning(tokenizer: PreTrainedTokenizerBase) -> Prompt:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return Prompt([token], "", "beginning of text")
    raise DataError("the tokenizer has neither a beginning nor an end of text to sample from: set synthesize.prompts")


def _check_length(prompts: list[Prompt], recipe: Recipe, teacher: PreTrainedModel) -> None:
    limit = getattr(teacher.config, "max_position_embeddings", None)
    longest = max(len(prompt.ids) for prompt in prompts)
    new = recipe.synthesize.max_new_tokens * (2 if prompts[0].asks else 1)
    if limit is not None and longest + new > limit:
        raise RunError(
            f"prompts of up to {longest:,} tokens and {new:,} new ones exceed the teacher's {limit:,} positions: "
            "lower synthesize.max_new_tokens or synthesize.max_prompt_tokens"
        )


# Files


def _begin(folder: Path, recipe: Recipe, begin: list[int], write: bool) -> dict:
    """The record to go on from."""
    settings = asdict(recipe.synthesize)
    del settings["out"], settings["prompts"]  # not where they are but what is in them
    depends_on = {
        "teacher": {
            "source": recipe.teacher.source,
            "files": file_identity(recipe.teacher.source, recipe.teacher.revision),
            "dtype": recipe.teacher.dtype,
        },
        "seed": recipe.run.seed,
        "settings": settings,
        "prompts": [source_identity(source) for source in recipe.synthesize.prompts],
        "fields": [recipe.data.text_field, recipe.data.messages_field, *([begin] if begin else [])],
    }
    record = read_json(folder / "synthesis.json")
    if record is None:
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"'{folder}' holds something else than sampled text: set synthesize.out to another folder")
        record = {"depends_on": depends_on, "versions": _versions(), "skipped_prompts": {}, "sha256": None}
        record |= dict.fromkeys(("batches", "sampled", "rows", "tokens", "cut", "empty", "bytes"), 0)
        if write:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / "synthesis.json", record)
            except OSError as error:
                raise RunError(f"sampled text cannot be written: {error}; set synthesize.out") from error
    teacher = record["depends_on"]["teacher"]
    teacher["files"] = model_files(teacher["files"])
    for name, value in depends_on.items():
        if record["depends_on"][name] != json.loads(json.dumps(value)):
            raise RunError(
                f"'{folder}' holds text of another {_what(name, record, value)}: set synthesize.out to another"
            )
    if record["sha256"]:
        path = folder / "data.jsonl.zst"
        if not path.is_file() or sha256(path) != record["sha256"]:
            raise RunError(f"{path} is missing or damaged: remove '{folder}' to sample it anew")
    elif write:
        _cut_back(folder, record)
    return record


def _what(name: str, record: dict, value) -> str:
    if name == "settings":
        old = record["depends_on"][name]
        name = next(key for key in value if old.get(key) != value[key])
        return f"synthesize.{name} ({old.get(name)}, not {value[name]})"
    return f"run.seed ({record['depends_on'][name]}, not {value})" if name == "seed" else name


def _cut_back(folder: Path, record: dict) -> None:
    """Drops what the last batch had written when it was interrupted: it is sampled again."""
    partial, final = folder / ".data.jsonl.zst", folder / "data.jsonl.zst"
    if not partial.exists() and final.exists():  # interrupted between its renaming and the record of it
        os.replace(final, partial)
    if not partial.exists() and not record["bytes"]:
        return
    if not partial.exists() or partial.stat().st_size < record["bytes"]:
        raise RunError(f"{partial} is shorter than was written: remove '{folder}' to sample it anew")
    os.truncate(partial, record["bytes"])


def _append(folder: Path, record: dict, batches: list[list[dict]]) -> None:
    """Adds the rows of batches, and says in the record that they are there."""
    lines = ("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode() for rows in batches)
    frames = b"".join(zstandard.ZstdCompressor().compress(rows) for rows in lines if rows)
    partial = folder / ".data.jsonl.zst"
    try:
        with partial.open("ab") as file:
            file.write(frames)
            file.flush()
            os.fsync(file.fileno())
            record["bytes"] = file.tell()
        write_json(folder / "synthesis.json", record)
    except OSError as error:
        raise RunError(
            f"{partial} could not be written ({error}); what was sampled before is intact: free some space, then run "
            "the same command to go on"
        ) from error


def _finish(folder: Path, record: dict) -> None:
    if not record["rows"]:
        raise RunError(f"all {record['sampled']:,} samples are empty: set other synthesize.prompts or synthesize.chat")
    partial, final = folder / ".data.jsonl.zst", folder / "data.jsonl.zst"
    digest = sha256(partial)
    os.replace(partial, final)
    write_json(folder / "synthesis.json", record | {"sha256": digest})


def _versions() -> dict[str, str]:
    names = ("transpoint", "torch", "transformers", "tokenizers")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
