"""What the stages of one process share: recipe, accelerate's handle, teacher, tokenizer, text."""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from ...students import HybridForCausalLM
from ...teachers import output_head, share_layers
from ..config import Recipe
from ..console import console_of
from ..data.corpus import Corpus, tokenize_corpus
from ..data.packed import PackedDataset, collate
from ..data.rows import check_tokens
from ..data.sources import DataError, source_identity
from ..data.streaming import StreamedDataset
from ..data.teacher_cache import CachedTargets
from ..measure.figures import in_words
from ..measure.held_out import HeldOut
from ..measure.measures import Texts, held_out_texts
from ..models import embedding_rows, load_model, on_device, teacher_of
from ..run.folder import StageFolder
from ..run.identity import identity
from ..run.records import Quality
from ..run.seconds import part
from ..tokenizers import beginning, save_tokenizer
from .pipeline import student_before
from .preflight import check_vocabulary
from .processes import free_memory, make_accelerator, precision
from .tune import TUNE


class Session:
    """What the stages of one process share. Teacher, tokenizer and text are loaded when first asked for."""

    def __init__(self, recipe: Recipe, console: Console | None = None):
        self.recipe = recipe
        self.root = Path(recipe.run.dir)
        self.accelerator = make_accelerator(recipe)
        self.precision = precision(recipe, self.accelerator.device)
        self.console = console or console_of(quiet=not self.accelerator.is_main_process)
        self.on_step: Callable[[int], None] | None = None
        self.exports = False  # whether this run goes on to the export
        self.anew = False  # whether the stage at work was asked for though it was done
        self._loaded: tuple[PreTrainedModel, Any] | None = None
        self._held_out: HeldOut | None = None
        self._cached_targets: CachedTargets | None = None
        self._texts: dict[int, PackedDataset | StreamedDataset] = {}  # of training, by the length of sequences

    def folder(self, stage: str) -> StageFolder:
        return StageFolder(self.root, stage)

    def say(self, message: str | Text) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @property
    def teacher(self) -> PreTrainedModel:
        return self._load()[0]

    @property
    def tokenizer(self):
        return self._load()[1]

    def _load(self) -> tuple[PreTrainedModel, Any]:
        if self._loaded is None:
            model, tokenizer = teacher_of(self.recipe, self.accelerator.device)
            check_vocabulary(tokenizer, model, "teacher")
            self._loaded = model.requires_grad_(False), tokenizer
        return self._loaded

    @cached_property
    def _rows_to_check(self) -> int | None:
        """Rows of the teacher's embeddings, where its tokenizer has tokens beyond them."""
        rows = embedding_rows(self.teacher)
        return rows if max(self.tokenizer.get_vocab().values()) >= rows else None

    @property
    def train_data(self) -> PackedDataset | StreamedDataset:
        """The training text in sequences of `data.length`."""
        return self._in_sequences_of(self.recipe.data.length)

    def text_of(self, stage: str) -> PackedDataset | StreamedDataset:
        """The training text in the sequences that a stage takes."""
        return self._in_sequences_of(self.recipe.length_in(stage))

    def _in_sequences_of(self, length: int) -> PackedDataset | StreamedDataset:
        if length not in self._texts:
            self._texts[length] = (
                self._streamed(length) if self.recipe.data.streaming else PackedDataset(self._train_corpus, length)
            )
        return self._texts[length]

    @cached_property
    def _train_corpus(self) -> Corpus:
        return self._corpus("train", self.recipe.data.train, self.recipe.data.max_train_tokens)

    def _streamed(self, length: int) -> StreamedDataset:
        data = self.recipe.data
        dataset = StreamedDataset(
            data.train,
            self.tokenizer,
            length,
            text_field=data.text_field,
            messages_field=data.messages_field,
            bos=data.bos,
            shuffle_buffer=data.shuffle_buffer,
            rows=self._rows_to_check,
        )
        self.say(f"train text: {dataset.summary()}")
        return dataset

    @cached_property
    def tune_data(self) -> PackedDataset:
        """What *tune* is trained on: chats and completions, with their answers marked."""
        data, own = self.recipe.data, TUNE.of(self.recipe).train
        corpus = self._corpus("tune", own or data.train, None if own else data.max_train_tokens, answers=True)
        length = self.recipe.length_in(TUNE.name)
        whole = len(corpus.tokens) // length * length  # what is in no sequence is never read
        if corpus.answers is None or not corpus.answered or int(corpus.answers[0, 0]) >= whole > 0:
            raise DataError(
                f"no answer in the first {len(corpus.tokens):,} tokens of {', '.join(corpus.sources)}: raise "
                "data.max_train_tokens, or name chats in tune.train"
            )
        return PackedDataset(corpus, length)

    def calibration_batches(self) -> list[dict[str, torch.Tensor]]:
        """The training sequences that the teacher's attention is measured on, one at a time."""
        batches = (collate([item]) for item in self.train_data.spread(self.recipe.calibrate.sequences))
        return [{key: value.to(self.accelerator.device) for key, value in batch.items()} for batch in batches]

    @part("loading")
    def cached_targets(self) -> CachedTargets:
        """The training data with the teacher's cached predictions, checked against the recipe the first time."""
        if self._cached_targets is None:
            # A recipe with a cache does not stream.
            dataset, folder = cast(PackedDataset, self.text_of("distill")), cast(str, self.recipe.distill.teacher_cache)
            # One process reads all of the cache to find out whether it is whole.
            cached = CachedTargets(dataset, folder, verify=self.accelerator.is_main_process)
            cached.check(self.recipe, output_head(self.teacher, check=False))
            self._cached_targets = cached
        return self._cached_targets

    @contextmanager
    def teacher_for_training(self, rounded: bool = True) -> Iterator[None]:
        """Meanwhile `teacher` is in the dtype and, where processes share it, the share that training has of it. Not
        `rounded`: in its own dtype, unless the recipe names one.

        Afterwards it is as it was, from the CPU's memory. Where that has no room for it, where it was shared, and after
        an error, it is given up, and whoever asks for it gets it loaded again: nothing that is made of it in here may
        outlive this.
        """
        settings, device = self.recipe.teacher, self.accelerator.device
        dtype = self.recipe.training_dtype(self.precision if rounded else "fp32")
        shares = settings.share and self.accelerator.num_processes > 1
        if dtype == settings.dtype and not shares:
            yield
            return
        aside, is_back = None if shares else self._weights_aside(), False
        try:
            for parameter in self.teacher.parameters():  # alone: rotary frequencies stay in float32
                parameter.data = parameter.data.to(getattr(torch, dtype))
            if shares:
                share_layers(self.teacher)
            yield
            if aside is not None:
                for parameter, whole in zip(self.teacher.parameters(), aside, strict=True):
                    parameter.data = whole.to(device)
                is_back = True
        finally:
            if not is_back:
                self._loaded = self._held_out = None
                gc.collect()  # hooks of shared layers refer back to them
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _weights_aside(self) -> list[torch.Tensor] | None:
        """The teacher's weights in the CPU's memory; None where those of all processes would take over a quarter of
        what is free."""
        weights = [parameter.data for parameter in self.teacher.parameters()]
        size = sum(weight.nbytes for weight in weights) * self.accelerator.num_processes
        return [weight.cpu() for weight in weights] if size <= free_memory() / 4 else None

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
    def held_out_data(self) -> PackedDataset:
        data = self.recipe.data
        return PackedDataset(self._corpus("heldout", data.heldout, data.max_heldout_tokens), data.length)

    @property
    def held_out(self) -> HeldOut:
        if self._held_out is None:
            sequences = self.recipe.evaluate.sequences
            teacher = None if self.recipe.from_scratch else self.teacher
            self._held_out = HeldOut(self.held_out_data, sequences, self.tokenizer, teacher)
        return self._held_out

    @cached_property
    def held_out_texts(self) -> Texts:
        """By source and by further lengths: see `measure.measures.held_out_texts`."""
        most = self.recipe.data.max_heldout_tokens
        return held_out_texts(
            self.recipe,
            self.held_out_data,
            lambda source: self._corpus(f"heldout ({source})", [source], most),
            self.say,
        )

    @part("tokenising")
    def _corpus(self, name: str, sources: list[str], max_tokens: int | None, answers: bool = False) -> Corpus:
        data = self.recipe.data
        with self.accelerator.main_process_first():
            corpus: Corpus = tokenize_corpus(
                sources,
                self.tokenizer,
                text_field=data.text_field,
                messages_field=data.messages_field,
                bos=data.bos,
                answers=answers,
                max_tokens=max_tokens,
                cache=data.cache or self.root / "data",
            )
        # Not while it is tokenised: in a cache that runs share it may come from a run of another teacher.
        if self._rows_to_check is not None:
            check_tokens(corpus.tokens, self._rows_to_check, self.tokenizer, ", ".join(corpus.sources))
        self.say(f"{name} text: {corpus.summary()}")
        return corpus

    def student_before(self, stage: str) -> HybridForCausalLM:
        """The student that a stage starts from."""
        return self.student(student_before(self.recipe, stage))

    def student(self, stage: str) -> HybridForCausalLM:
        """The student that a stage left."""
        # In float32 whatever the teacher is in: training keeps full-precision weights, and rounds in the products.
        return load_model(self.folder(stage) / "student", torch.float32).to(self.accelerator.device)

    @part("saving")
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

    def measure(self, student: PreTrainedModel, stage: str, late: int | None = None) -> Quality:
        """The student's held-out quality, said and for the record; `late`: see `HeldOut.measure`."""
        quality = dataclasses.replace(self.held_out.measure(student, late), measured_on=self.measured_on)
        self.say(f"{stage}: held-out {in_words(quality)}")
        return quality
