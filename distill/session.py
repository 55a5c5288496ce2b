"""What the stages of one process share: recipe, accelerate's handle, teacher, tokenizer, text."""

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..students import HybridForCausalLM
from ..teachers import load_teacher, output_head, share_layers
from .config import Recipe
from .data import Corpus, PackedDataset, beginning, check_tokens, tokenize_corpus
from .identity import identity
from .models import embedding_rows, load_model, on_device
from .preflight import check_vocabulary
from .protocols import Objective
from .quality import HeldOut
from .run import RunError, StageFolder
from .sources import source_identity
from .stages.pipeline import student_before
from .streaming import StreamedDataset
from .teacher_cache import CachedTargets
from .tokenizers import save_tokenizer

_DISTRIBUTED = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
)


class Session:
    """What the stages of one process share. Teacher, tokenizer and text are loaded when first asked for."""

    def __init__(self, recipe: Recipe, console: Console | None = None):
        self.recipe = recipe
        self.root = Path(recipe.run.dir)
        self.accelerator = make_accelerator(recipe)
        self.precision = _precision(recipe, self.accelerator)
        self.console = console or Console(quiet=not self.accelerator.is_main_process)
        self.on_step: Callable[[int], None] | None = None
        self.exports = False  # whether this run goes on to the export

    def folder(self, stage: str) -> StageFolder:
        return StageFolder(self.root, stage)

    def say(self, message: str | Text) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @cached_property
    def _loaded(self):
        settings = self.recipe.teacher
        model, tokenizer = load_teacher(
            settings.source, settings.dtype, self.accelerator.device, settings.trust_remote_code
        )
        check_vocabulary(tokenizer, model, "teacher")
        return model.requires_grad_(False), tokenizer

    @property
    def teacher(self) -> PreTrainedModel:
        return self._loaded[0]

    @property
    def tokenizer(self):
        return self._loaded[1]

    @cached_property
    def _rows_to_check(self) -> int | None:
        """Rows of the teacher's embeddings, where its tokenizer has tokens beyond them."""
        rows = embedding_rows(self.teacher)
        return rows if max(self.tokenizer.get_vocab().values()) >= rows else None

    @cached_property
    def train_data(self) -> PackedDataset | StreamedDataset:
        data = self.recipe.data
        if not data.streaming:
            return self._packed("train", data.train, data.max_train_tokens)
        dataset = StreamedDataset(
            data.train,
            self.tokenizer,
            data.length,
            text_field=data.text_field,
            messages_field=data.messages_field,
            bos=data.bos,
            shuffle_buffer=data.shuffle_buffer,
            rows=self._rows_to_check,
        )
        self.say(f"train text: {dataset.summary()}")
        return dataset

    @cached_property
    def cached_targets(self) -> CachedTargets:
        """The training data with the teacher's cached predictions, checked against the recipe."""
        # A recipe with a cache does not stream.
        dataset, folder = cast(PackedDataset, self.train_data), cast(str, self.recipe.distill.teacher_cache)
        # One process reads all of the cache to find out whether it is whole.
        cached = CachedTargets(dataset, folder, verify=self.accelerator.is_main_process)
        cached.check(self.recipe, output_head(self.teacher, check=False))
        return cached

    @contextmanager
    def teacher_in_training(self, objective: Objective) -> Iterator[None]:
        """The teacher in the dtype and, where processes share it, the share that training has of it meanwhile.

        If that is not what it was loaded as, whoever asks for the teacher afterwards gets it loaded again, and the
        objective is without.
        """
        settings, device = self.recipe.teacher, self.accelerator.device
        dtype = self.recipe.training_dtype(on_gpu=device.type == "cuda")
        shares = settings.share and self.accelerator.num_processes > 1
        if dtype == settings.dtype and not shares:
            yield
            return
        for parameter in self.teacher.parameters():  # alone: rotary frequencies stay in float32
            parameter.data = parameter.data.to(getattr(torch, dtype))
        if shares:
            share_layers(self.teacher)
        try:
            yield
        finally:
            objective.beside = ()
            for name in ("_loaded", "held_out"):
                self.__dict__.pop(name, None)
            gc.collect()  # hooks of shared layers refer back to them
            if device.type == "cuda":
                torch.cuda.empty_cache()

    @contextmanager
    def teacher_off_device(self) -> Iterator[None]:
        """Leaves the device's memory to the student meanwhile."""
        on_device(self.teacher, "cpu")
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            yield
        finally:
            self.teacher.to(self.accelerator.device)

    @cached_property
    def _held_out_data(self) -> PackedDataset:
        return self._packed("heldout", self.recipe.data.heldout, self.recipe.data.max_heldout_tokens)

    @cached_property
    def held_out(self) -> HeldOut:
        return HeldOut(self._held_out_data, self.recipe.evaluate.sequences, self.tokenizer, self.teacher)

    def _packed(self, name: str, sources: list[str], max_tokens: int | None) -> PackedDataset:
        data = self.recipe.data
        with self.accelerator.main_process_first():
            corpus: Corpus = tokenize_corpus(
                sources,
                self.tokenizer,
                text_field=data.text_field,
                messages_field=data.messages_field,
                bos=data.bos,
                max_tokens=max_tokens,
                cache=data.cache or self.root / "data",
            )
        # Not while it is tokenised: in a cache that runs share it may come from a run of another teacher.
        if self._rows_to_check is not None:
            check_tokens(corpus.tokens, self._rows_to_check, self.tokenizer, ", ".join(corpus.sources))
        self.say(f"{name} text: {corpus.summary()}")
        return PackedDataset(corpus, data.length)

    def check_cached_targets(self) -> None:
        """Raises where the cache of the teacher's predictions does not fit this run."""
        self.cached_targets  # noqa: B018

    def student_before(self, stage: str) -> HybridForCausalLM:
        """The student that a stage starts from."""
        return self.student(student_before(self.recipe, stage))

    def student(self, stage: str) -> HybridForCausalLM:
        """The student that a stage left."""
        # In float32 whatever the teacher is in: training keeps full-precision weights, and rounds in the products.
        return load_model(self.folder(stage) / "student", torch.float32).to(self.accelerator.device)

    def save(self, student: HybridForCausalLM, folder: StageFolder) -> None:
        if self.accelerator.is_main_process:
            student.save_pretrained(folder / "student")
            save_tokenizer(self.tokenizer, folder / "student")

    @cached_property
    def measured_on(self) -> str:
        """Stands for the held-out sequences in records of quality, so that only like is compared with like."""
        data = self.recipe.data
        sources = [source_identity(source) for source in data.heldout]
        fields = [data.text_field, data.messages_field, data.length, data.max_heldout_tokens]
        fields += [data.bos] if beginning(self.tokenizer) else []
        return identity({"text": sources, "fields": fields, "sequences": self.recipe.evaluate.sequences})

    def measure(self, student: PreTrainedModel, stage: str, late: int | None = None) -> dict:
        """The student's held-out quality, said and for the record; `late`: see `HeldOut.measure`."""
        quality = dataclasses.asdict(self.held_out.measure(student, late)) | {"measured_on": self.measured_on}
        self.say(
            f"{stage}: held-out KL {quality['kl']:.4f}, perplexity {quality['perplexity']:.2f}, "
            f"same top token {quality['same_top']:.1%}"
        )
        return quality


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate's handle on the processes that were launched. Raises RunError where they cannot train together."""
    device = recipe.run.device
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not on_gpu:
        raise RunError("run.device is cuda, but no GPU is to be seen; set run.device=cpu")
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    deepspeed, fsdp = (_asked_for(f"ACCELERATE_USE_{kind}") for kind in ("DEEPSPEED", "FSDP"))
    if deepspeed and device == "cpu" and torch.cuda.is_available():
        raise RunError("DeepSpeed takes the GPU where there is one: leave out run.device=cpu, or hide the GPU")
    alone = (
        f"{wanted} processes were launched, but they do not see each other (world size 1): each would train alone; "
        "check the launch configuration"
    )
    if wanted > 1 and "MASTER_ADDR" not in os.environ:
        raise RunError(alone)
    # Unasked, DeepSpeed on CPUs leaves each process alone.
    handlers = [InitProcessGroupKwargs(backend="gloo")] if not on_gpu and wanted > 1 else []
    if deepspeed and not on_gpu:
        _without_shared_memory_op()
    # Precision is the trainer's, so that parameters are in float32 under every engine.
    accelerator = Accelerator(cpu=not on_gpu and not deepspeed, mixed_precision="no", kwargs_handlers=handlers)
    if deepspeed:  # or transformers would cut up each model as it loads it, the teacher too
        unset_hf_deepspeed_config()
    if fsdp and accelerator.distributed_type == DistributedType.MULTI_CPU:  # accelerate has FSDP on GPUs only
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    # Whenever accelerate looks its state up, it takes this one's kind, and so forgets FSDP after the first optimizer.
    PartialState().distributed_type = accelerator.distributed_type
    if accelerator.distributed_type not in _DISTRIBUTED:
        raise RunError(
            f"{accelerator.distributed_type.value} is not supported: choose one process, DDP, DeepSpeed or FSDP2 with "
            "`accelerate config`, or a file of configs/accelerate"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RunError("FSDP version 1 is not supported: set fsdp_version: 2 in accelerate's configuration")
    if accelerator.num_processes != wanted:
        raise RunError(alone)
    return accelerator


def _without_shared_memory_op() -> None:
    """Between processes on CPUs DeepSpeed would compile an operation of its own: a minute, and a C++ compiler. gloo is
    there in any case."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _asked_for(variable: str) -> bool:
    """Whether accelerate's launcher set this."""
    return os.environ.get(variable, "false").lower() == "true"


def _precision(recipe: Recipe, accelerator: Accelerator) -> str:
    if recipe.run.precision != "auto":
        return recipe.run.precision
    return "bf16" if accelerator.device.type == "cuda" or _multiplies_bf16() else "fp32"


def _multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions; without them bfloat16 is slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
