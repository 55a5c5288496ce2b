"""An offline teacher: its predictions on the training sequences, written once and read in its place.

    FOLDER/index.json                what the cache depends on, its shards with their checksums, what truncation costs
    FOLDER/shard-00000.safetensors   of n sequences of L tokens:
        items     (n,) int64             their numbers in the training data
        ids       (n, L, k) uint16       the teacher's k most likely next tokens (int32 where the vocabulary is larger)
        logprobs  (n, L, k)              their log-probabilities, at the temperature of distill
        rest      (n, L)                 log of the mass of all other tokens
        hidden    (n, L, D)              the decoder's last hidden states, if wanted: with the teacher's output matrix
                                         they are its whole predictions

A shard is written aside and renamed, then entered in the index: an interrupted cache goes on with the next shard, and
one that lacks sequences is added to.
"""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ...kernels.kl_reference import CHUNK_BYTES, _matmul, capped
from ...teachers import OutputHead, output_head
from ..config import Recipe
from ..errors import RunError
from ..run.files import read_json, sha256, write_json
from ..run.identity import file_identity, model_files
from ..run.progress import Progress
from ..settings import CacheTeacherConfig
from .packed import PackedDataset, batch_indices, collate

FORMAT = 1  # of the folder; raise it when an older one would be read wrongly


class CachedTargets(torch.utils.data.Dataset):
    """The training sequences, each with what the cache in `folder` holds of the teacher's predictions on it.

    Item i is that of `dataset`, and {"teacher_ids": (L, k) int32, "teacher_logprobs": (L, k) float32, "teacher_rest":
    (L,) float32} with probabilities that add up to 1, and "teacher_hidden": (L, D) float32 where it was cached. Shards
    are memory-mapped: what is not asked for is not read.

    Raises RunError where there is no cache, or a shard is missing or damaged (with `verify`, all are read to find out).
    """

    def __init__(self, dataset: PackedDataset, folder: str | Path, verify: bool = True):
        self.dataset, self.folder = dataset, Path(folder)
        self.index = read_index(self.folder)
        self.tokens_per_item = dataset.tokens_per_item
        if verify and (damaged := _damaged(self.folder, self.index)):
            name, why = next(iter(damaged.items()))
            raise RunError(_damage(self.folder / name, why))
        self._shards = [_opened(self.folder / shard["file"]) for shard in self.index["shards"]]
        self._places = torch.full((len(dataset), 2), -1, dtype=torch.int32)  # shard and row of each sequence
        for number, shard in enumerate(self._shards):
            items = shard.get_tensor("items")
            rows = (items < len(dataset)).nonzero().flatten()  # of another text there may be more: see `check`
            self._places[items[rows], 0], self._places[items[rows], 1] = number, rows.int()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.dataset[index]
        number, row = self._places[index].tolist()
        if number < 0:
            raise RunError(f"{self.folder} lacks sequence {index}: {_REMEDY}")
        shard = self._shards[number]
        ids, logprobs, rest = (shard.get_slice(name)[row] for name in ("ids", "logprobs", "rest"))
        logprobs, rest = _normalised(logprobs, rest)
        item |= {"teacher_ids": ids.int(), "teacher_logprobs": logprobs, "teacher_rest": rest}
        if self.index["hidden"]:
            item["teacher_hidden"] = shard.get_slice("hidden")[row].float()
        return item

    def batch(self, step: int, batch_size: int, seed: int, slots: range) -> list[dict[str, Tensor]]:
        """As `PackedDataset.batch`."""
        indices = batch_indices(len(self), batch_size, seed, step)
        return [self[indices[slot]] for slot in slots]

    def spread(self, count: int) -> list[dict[str, Tensor]]:
        """As `PackedDataset.spread`, without the teacher's predictions: the cache may not have those."""
        return self.dataset.spread(count)

    def check(self, recipe: Recipe, head: OutputHead) -> None:
        """Raises RunError where this is not the cache of the recipe's teacher on the sequences that distill takes.

        `head`: the teacher's.
        """
        if recipe.distill.hidden_weight > 0:
            raise RunError(
                "distill.hidden_weight needs the hidden states of all layers, which no cache has: set it to 0, or "
                "distill.teacher_cache=null"
            )
        _refuse_another(self.folder, self.index["targets"], targets_of(recipe, self.dataset, head))
        needed = torch.tensor(items_of_distill(recipe, len(self)), dtype=torch.long)
        if missing := int((self._places[needed, 0] < 0).sum()):
            raise RunError(f"{self.folder} lacks {missing:,} of the {len(needed):,} sequences of distill: {_REMEDY}")

    @property
    def summary(self) -> str:
        """One line for people: what is here, and what it costs that the rest is not."""
        return describe(self.index)


def cache_teacher(
    recipe: Recipe,
    teacher: PreTrainedModel,
    dataset: PackedDataset,
    accelerator: Accelerator,
    console: Console,
    precision: str = "fp32",
) -> dict:
    """Writes what is still missing of the cache at `distill.teacher_cache`, and returns its index.

    Of each sequence that distill takes: top k and rest of softmax(logits / distill.temperature). Processes share the
    shards. `precision`: of the matrix products, fp32 or bf16, as in training.

    Raises:
        RunError: no folder is set, it holds something else or another cache, or the disk is full: what was written
            stays, and the same call goes on.
    """
    settings = recipe.cache_teacher
    if recipe.distill.teacher_cache is None:
        raise RunError("distill.teacher_cache is null: set it to the folder that the cache should be in")
    folder = Path(recipe.distill.teacher_cache)
    head = output_head(teacher)
    vocab_size = len(head.weight)
    if settings.k > vocab_size:
        raise RunError(f"cache_teacher.k is {settings.k}; the teacher's vocabulary has {vocab_size:,} tokens")
    index = _begin(folder, recipe, dataset, head, accelerator, console, precision)
    present = {i for shard in index["shards"] for i in _opened(folder / shard["file"]).get_tensor("items").tolist()}
    missing = [item for item in items_of_distill(recipe, len(dataset)) if item not in present]
    size = _sequence_bytes(settings, dataset.tokens_per_item, teacher)
    free = shutil.disk_usage(folder).free
    if len(missing) * size > free:
        raise RunError(
            f"{folder} has {free / 1e6:,.0f} MB free, and the cache takes {len(missing) * size / 1e6:,.0f} MB more: "
            "lower cache_teacher.k, or free some space"
        )
    per_shard = max(1, settings.shard_mb * 10**6 // size)
    shards = [missing[first : first + per_shard] for first in range(0, len(missing), per_shard)]
    names = _free_names(index, len(shards))
    done = 0
    with Progress(console, "cache-teacher", len(missing), 0, dataset.tokens_per_item) as progress:
        for first in range(0, len(shards), accelerator.num_processes):
            mine = first + accelerator.process_index
            records = []
            if mine < len(shards):
                tensors, sums = _targets(
                    teacher,
                    dataset,
                    shards[mine],
                    settings,
                    recipe.distill.temperature,
                    accelerator.device,
                    precision,
                    partial(_show, progress, done),
                )
                digest = _write(folder / names[mine], tensors)
                records = [{"file": names[mine], "sha256": digest, "sequences": len(shards[mine]), **sums}]
            records = gather_object(records)
            index["shards"] = sorted(index["shards"] + records, key=lambda shard: shard["file"])
            done += sum(record["sequences"] for record in records)
            _sum_up(index, dataset.tokens_per_item)
            if accelerator.is_main_process:
                try:
                    write_json(folder / "index.json", index)
                except OSError as error:
                    raise _unwritable(folder / "index.json", error) from error
    accelerator.wait_for_everyone()
    return index


def items_of_distill(recipe: Recipe, n_items: int) -> Sequence[int]:
    """The numbers of the sequences that the recipe's distill steps take, in order, each once."""
    steps, batch_size = recipe.distill.steps, recipe.distill.batch_size
    if steps * batch_size >= n_items:
        return range(n_items)
    return sorted({i for step in range(steps) for i in batch_indices(n_items, batch_size, recipe.run.seed, step)})


def targets_of(recipe: Recipe, dataset: PackedDataset, head: OutputHead) -> dict:
    """Everything the teacher's predictions depend on, but the precision of products."""
    # Of a teacher without, caches of earlier versions are right, and of one with, they are wrong.
    extras = {"teacher.logits": head.extras} if head.extras else {}
    return extras | {
        "teacher.source": file_identity(recipe.teacher.source, recipe.teacher.revision),
        "teacher.dtype": recipe.teacher.dtype,
        "data.length": recipe.length_in("distill"),
        "distill.temperature": recipe.distill.temperature,
        "text": dataset.corpus.fingerprint,  # and tokenizer
    }


def cache_identity(folder: str | Path) -> dict | str:
    """Stands for a cache in what a stage depends on: the targets it gives, not which of them are there already."""
    index = read_json(Path(folder) / "index.json")
    return {name: index.get(name) for name in _SETTINGS} if isinstance(index, dict) else "none"


def read_index(folder: Path) -> dict:
    """What index.json holds. Raises RunError where there is no cache, or one of another format."""
    index = read_json(folder / "index.json")
    if not isinstance(index, dict):
        state = "is damaged" if (folder / "index.json").exists() else "is not there"
        raise RunError(
            f"{folder} holds no teacher cache, its index.json {state}: `transpoint cache-teacher CONFIG` makes one, "
            "distill.teacher_cache=null does without"
        )
    if index.get("format") != FORMAT:
        raise RunError(f"{folder} is a teacher cache of format {index.get('format')}, not {FORMAT}: {_OTHER}")
    return index


def describe(index: dict) -> str:
    """One line for people: what a cache holds, and what its truncation costs."""
    if index["hidden"]:
        return f"{index['sequences']:,} sequences, the teacher's last hidden states on them: its whole predictions"
    return (
        f"{index['sequences']:,} sequences, the {index['k']} most likely of {index['vocab_size']:,} tokens each; "
        f"the rest has {index['rest_mass']:.2%} of the mass, and KL(teacher || cached, rest spread evenly) is "
        f"{index['kl']:.4f} nats a token"
    )


_SETTINGS = ("format", "targets", "k", "dtype", "hidden", "vocab_size")
_REMEDY = "`transpoint cache-teacher CONFIG` again adds what is missing"
_OTHER = "set distill.teacher_cache to another folder, and run `transpoint cache-teacher CONFIG`"


def _refuse_another(folder: Path, cached: dict, wanted: dict) -> None:
    """Raises RunError, naming what differs."""
    words = []
    for name, value in wanted.items():
        if (model_files(cached.get(name)) if name == "teacher.source" else cached.get(name)) != value:
            short = isinstance(value, int | float) or name == "teacher.dtype"
            words.append(f"{name} ({cached.get(name)}, not {value})" if short else name)
    if words:
        raise RunError(f"{folder} is a cache of another {', '.join(words)}: {_OTHER}")


def _begin(folder, recipe, dataset, head, accelerator, console, precision) -> dict:
    """The index to add to; shards that are damaged are no longer in it."""
    settings, vocab_size = recipe.cache_teacher, len(head.weight)
    targets = targets_of(recipe, dataset, head)
    own = {"k": settings.k, "dtype": settings.dtype, "hidden": settings.hidden, "vocab_size": vocab_size}
    with accelerator.main_process_first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                index = {"format": FORMAT, "targets": targets, **own, "precision": precision}
                index["shards"] = []
                _sum_up(index, dataset.tokens_per_item)
                write_json(folder / "index.json", index)
        except OSError as error:
            raise RunError(f"the teacher cache cannot be written: {error}; set distill.teacher_cache") from error
        index = read_index(folder)
    _refuse_another(folder, index["targets"], targets)
    _refuse_another(folder, index, own)
    damaged = _damaged(folder, index)
    for name, why in damaged.items():
        console.print(f"{folder / name} {why}: it is made anew", highlight=False, markup=False, soft_wrap=True)
    index["shards"] = [shard for shard in index["shards"] if shard["file"] not in damaged]
    accelerator.wait_for_everyone()
    return index


@torch.no_grad()
def _targets(
    teacher: PreTrainedModel,
    dataset: PackedDataset,
    items: list[int],
    settings: CacheTeacherConfig,
    temperature: float,
    device: torch.device,
    precision: str,
    show: Callable[[int], None],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of a shard; the sums over its tokens of the KL that truncation costs, and of the mass of the rest."""
    parts, kl, rest_mass, head = [], 0.0, 0.0, output_head(teacher, check=False)
    for first in range(0, len(items), settings.batch_size):
        batch = collate([dataset[i] for i in items[first : first + settings.batch_size]])
        batch = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            hidden = teacher.get_decoder()(**batch, use_cache=False).last_hidden_state
        tensors, sums = _truncated(hidden, head, settings, temperature, precision)
        parts.append(tensors | ({"hidden": hidden.to(getattr(torch, settings.dtype)).cpu()} if settings.hidden else {}))
        for name, tensor in parts[-1].items():
            if name != "rest" and not tensor.float().isfinite().all():
                numbers = ", ".join(str(i) for i in items[first : first + settings.batch_size])
                raise RunError(
                    f"the teacher's {name} on the sequences {numbers} are not finite in {settings.dtype}: "
                    "set cache_teacher.dtype=float32, teacher.dtype=float32 or run.precision=fp32"
                )
        kl, rest_mass = kl + sums[0], rest_mass + sums[1]
        show(first + len(batch["input_ids"]))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {"items": torch.tensor(items), **tensors}, {"kl": kl, "rest_mass": rest_mass}


def _truncated(hidden, head, settings, temperature, precision) -> tuple[dict[str, Tensor], tuple[float, float]]:
    leading, (hidden, weight) = hidden.shape[:-1], head.operands(hidden)
    product_dtype = torch.bfloat16 if precision == "bf16" else torch.promote_types(hidden.dtype, weight.dtype)
    stored, matrix, vocab_size = getattr(torch, settings.dtype), weight.to(product_dtype), len(weight)
    flat, parts, kl, rest_mass = hidden.flatten(0, -2).to(product_dtype), [], 0.0, 0.0
    chunk = max(1, CHUNK_BYTES // (4 * vocab_size))
    for first in range(0, len(flat), chunk):
        logits, _ = capped(_matmul(flat[first : first + chunk], matrix.mT, torch.float32), head.softcap)
        log = logits.div_(temperature).log_softmax(-1)
        logprobs, ids = log.topk(settings.k)
        rest = log.scatter(1, ids, -math.inf).logsumexp(-1)
        parts.append((ids, logprobs.to(stored), rest.to(stored)))
        # What is read back is rounded: the cost is that of rounding too.
        read, read_rest = _normalised(*parts[-1][1:])
        top = logprobs.exp()
        kl += (top * (logprobs - read)).sum().item()
        rest_mass += rest.exp().sum().item()
        if settings.k < vocab_size:
            others = (log.exp() * log).sum(-1) - (top * logprobs).sum(-1)
            even = read_rest - math.log(vocab_size - settings.k)
            kl += (others - rest.exp() * even).sum().item()
    ids, logprobs, rest = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    ids = ids.to(torch.uint16 if vocab_size <= 2**16 else torch.int32)
    tensors = {"ids": ids, "logprobs": logprobs, "rest": rest}
    return {name: t.unflatten(0, leading).cpu() for name, t in tensors.items()}, (kl, rest_mass)


def _show(progress: Progress, done: int, sequences: int) -> None:
    progress.show(done + sequences)


def _normalised(logprobs: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """In float32, and adding up to 1, which rounding has changed."""
    both = torch.cat([logprobs, rest[..., None]], -1).float().log_softmax(-1)
    return both[..., :-1], both[..., -1]


def _sequence_bytes(settings: CacheTeacherConfig, length: int, teacher: PreTrainedModel) -> int:
    vocab_size, width = teacher.get_output_embeddings().weight.shape
    number = getattr(torch, settings.dtype).itemsize
    token = settings.k * (number + (2 if vocab_size <= 2**16 else 4)) + number * (1 + width * settings.hidden)
    return token * length + 8


def _free_names(index: dict, count: int) -> list[str]:
    """Of new shards: the place of one that was damaged is taken again."""
    taken = {shard["file"] for shard in index["shards"]}
    names = (f"shard-{number:05d}.safetensors" for number in range(len(taken) + count))
    return [name for name in names if name not in taken][:count]


def _sum_up(index: dict, length: int) -> None:
    sequences = sum(shard["sequences"] for shard in index["shards"])
    index["sequences"] = sequences
    for name in ("kl", "rest_mass"):
        index[name] = sum(shard[name] for shard in index["shards"]) / max(1, sequences * length)


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes a shard whole or not at all; returns its SHA-256."""
    aside = path.with_name(f".{path.name}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        digest = sha256(aside)
        os.replace(aside, path)
        return digest
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> RunError:
    return RunError(
        f"{path} could not be written ({error}); the shards before it are intact: free some space, then run the same "
        "command to go on"
    )


def _damaged(folder: Path, index: dict) -> dict[str, str]:
    """{file: what is wrong with it} of the shards that are not what was written."""

    def look(shard: dict) -> str | None:
        try:
            same = sha256(folder / shard["file"]) == shard["sha256"]
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None if same else "is not what was written"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        found = pool.map(look, index["shards"])
        return {shard["file"]: why for shard, why in zip(index["shards"], found, strict=True) if why}


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise RunError(_damage(path, f"cannot be read ({error})")) from error


def _damage(path: Path, why: str) -> str:
    return f"{path} {why}: `transpoint cache-teacher CONFIG` makes it anew"
