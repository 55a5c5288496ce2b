"""What a recipe may say, section by section; `config.Recipe` is all of them, and reads them. Loads nothing heavy.

The section of a stage that came later stands in the stage's own file.
"""

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from .export.formats import DTYPES, FORMATS, QUANTISED

RECALL = ("passkey", "multikey", "pairs")  # tasks of `measure.recall`


def setting(default: Any, help: str, **metadata) -> Any:
    """A dataclass field with its documentation. `metadata` may hold `choices`, `minimum`, `maximum`, `above`, `below`;
    `path`: "read" (looked up beside its file), "teacher" (the same, or a name), or "written"; `result`: False where the
    setting changes nothing in what a stage makes, but for how sums are rounded, so that it may be changed in the
    middle; and `added`: True where earlier versions did what its default does, so that what they made still holds."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class RunConfig:
    dir: str = setting("runs/default", "folder of the run: everything the recipe produces", path="written")
    seed: int = setting(0, "of data order and initialisation", minimum=0)
    device: str = setting("auto", "auto (a GPU where there is one), cpu or cuda", choices=("auto", "cpu", "cuda"))
    precision: str = setting(
        "auto",
        "of the matrix products in training: fp32, bf16, or auto (bf16 where the hardware multiplies it)",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = setting(
        True,
        "whether on a GPU layers are compiled in training, and passes recorded as CUDA graphs where each process has "
        "a whole copy of the student",
    )
    reuse: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders of other runs: a stage they have finished that depends on just the same is taken over",
            "path": "written",
        },
    )
    trackers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "where training metrics go besides metrics.jsonl: tensorboard (files in RUN/tracking), wandb, "
            "trackio; each must be installed",
            "choices": ("tensorboard", "wandb", "trackio"),
        },
    )


@dataclass
class TeacherConfig:
    source: str = setting(
        "smollm2-135m",
        "registry name, random-FAMILY, hub id, folder, or .gguf file; scratch-FAMILY: none, train begins anew",
        path="teacher",
    )
    sizes: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "of a random or scratch model, fields of its config: hidden_size and others", "added": True},
    )
    # The commit that it stands for is what counts: `run.identity.file_identity`.
    revision: str | None = setting(
        None, "branch, tag or commit of a hub teacher; null: its default branch", result=False
    )
    dtype: str = setting("float32", "of the teacher's weights", choices=("float32", "bfloat16", "float16"))
    training_dtype: str = setting(
        "auto",
        "of the teacher's weights while a stage trains; auto: bfloat16 where products are taken in it (run.precision), "
        "else as dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    share: bool = setting(
        False,
        "whether, while a stage trains, each process holds a share of the teacher's layers only; they are then put "
        "together one by one",
        result=False,
    )
    trust_remote_code: bool = setting(False, "whether code that travels with the teacher may run")


@dataclass
class DataConfig:
    """The text of a recipe and how it is cut into sequences."""

    train: list[str] = field(
        default_factory=list, metadata={"help": "sources of training text, read in this order", "path": "read"}
    )
    heldout: list[str] = field(
        default_factory=list,
        metadata={"help": "sources of text to measure on; share no document with train", "path": "read"},
    )
    text_field: str = field(default="text", metadata={"help": "field of a row that holds a document as a string"})
    messages_field: str = field(
        default="messages", metadata={"help": "field of a row that holds a chat: a list of {role, content}"}
    )
    bos: bool = field(
        default=True,
        metadata={
            "help": "whether texts begin as the teacher's tokenizer begins one: with its beginning token, if it adds "
            "one (chats begin as the chat template has it)"
        },
    )
    length: int = field(default=1024, metadata={"help": "tokens per packed sequence", "minimum": 2})
    max_train_tokens: int | None = field(
        default=None, metadata={"help": "stop reading train at this many tokens; null reads everything", "minimum": 1}
    )
    max_heldout_tokens: int | None = field(
        default=None, metadata={"help": "stop reading heldout at this many tokens; null reads everything", "minimum": 1}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "whether train is read and tokenised while training runs, instead of all of it before"},
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={"help": "documents shuffled together, for each sequence of a batch, when streaming", "minimum": 1},
    )
    cache: str | None = field(
        default=None,
        metadata={
            "help": "folder for tokenised text, may be shared by runs; null: in the run folder",
            "path": "written",
            "result": False,
        },
    )


@dataclass
class CalibrateConfig:
    sequences: int = setting(8, "training sequences the teacher's attention is measured on", minimum=1)
    decay: str = setting(
        "fit",
        "of each head: fit (what explains the teacher's head best) or lookback (its mean look-back)",
        choices=("fit", "lookback"),
    )


@dataclass
class TrainConfig:
    steps: int = setting(100, "optimizer steps", minimum=0)
    batch_size: int = setting(8, "sequences in a step, over all processes and accumulation", minimum=1)
    length: int | None = setting(None, "tokens of a sequence; null: data.length", minimum=2, added=True)
    micro_batch_size: int | None = setting(
        None, "sequences in one forward pass of one process; null: the whole share of a step", minimum=1, result=False
    )
    lr: float = setting(1e-3, "learning rate of the mixers, at its highest", above=0)
    warmup: float = setting(0.05, "fraction of the steps in which the learning rate rises", minimum=0, maximum=1)
    final_lr: float = setting(0.1, "fraction of the learning rate left at the end of its cosine", minimum=0, maximum=1)
    weight_decay: float = setting(0.0, "of AdamW, on matrices only", minimum=0)
    betas: list[float] = field(
        default_factory=lambda: [0.9, 0.95], metadata={"help": "of AdamW", "length": 2, "minimum": 0, "maximum": 1}
    )
    clip: float = setting(1.0, "largest norm of the gradient", above=0)
    max_skipped: int = setting(
        10,
        "steps in a row that may be skipped because their gradient is not finite, before training stops",
        minimum=1,
        result=False,
    )
    log_every: int = setting(10, "steps between lines of metrics.jsonl", minimum=1, result=False)
    checkpoint_every: int = setting(100, "steps between checkpoints", minimum=1, result=False)
    keep_checkpoints: int = setting(2, "how many checkpoints to keep", minimum=1, result=False)


@dataclass
class AlignConfig(TrainConfig):
    copied_lr: float | None = setting(
        None,
        "learning rate of what of the mixers came from the teacher; null: lr",
        above=0,
        added=True,
    )


@dataclass
class AnnealConfig:
    fraction: float | None = setting(
        None,
        "of the steps, in which every TransPoint of a transmamba student falls from a sequence's length, where it is "
        "the teacher, to its target; null: it is at its target from the first step on",
        above=0,
        maximum=1,
    )
    shape: str = setting(
        "log", "of the fall: linear, or log (by the same factor in each step)", choices=("linear", "log")
    )


@dataclass
class GroupConfig:
    lr: float | None = setting(
        None, "its highest learning rate; 0 leaves it frozen; null: lr for mixers, teacher_lr for the others", minimum=0
    )
    weight_decay: float | None = setting(None, "on its matrices; null: as the stage's", minimum=0)


@dataclass
class GroupsConfig:
    mixers: GroupConfig = field(default_factory=GroupConfig)
    attention: GroupConfig = field(default_factory=GroupConfig)
    mlp: GroupConfig = field(default_factory=GroupConfig)
    norms: GroupConfig = field(default_factory=GroupConfig)
    embeddings: GroupConfig = field(default_factory=GroupConfig)
    head: GroupConfig = field(default_factory=GroupConfig)
    other: GroupConfig = field(default_factory=GroupConfig)


@dataclass
class LoraSettings(GroupConfig):
    rank: int = setting(
        0, "of adapters (LoRA) on projections, which are merged when the stage ends; 0: none", minimum=0
    )
    alpha: float = setting(16.0, "what the adapters add is multiplied by alpha / rank", above=0)
    dropout: float = setting(0.0, "of the adapters' input", minimum=0, maximum=1)
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "projections that get adapters, by the last part of their names"},
    )
    lr: float | None = setting(1e-3, "highest learning rate of the adapters", above=0)


@dataclass
class EndToEndConfig(TrainConfig):
    """Of stages that train a student as a whole."""

    lr: float = setting(5e-4, "learning rate of the mixers, at its highest", above=0)
    teacher_lr: float | None = setting(
        None,
        "learning rate of the parameters that were the teacher's; 0 leaves them frozen; null: a tenth of lr, or 0 "
        "beside adapters",
        minimum=0,
    )
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    gradient_checkpointing: bool = setting(
        False,
        "whether layers are computed again in the backward pass: a third more time for far less memory",
        result=False,
    )
    divergence: str = setting(
        "forward",
        "between the distributions of the next token: forward KL(teacher || student), reverse, or jsd",
        choices=("forward", "reverse", "jsd"),
    )
    beta: float = setting(0.5, "the teacher's share of the mixture, for jsd", above=0, below=1)
    temperature: float = setting(1.0, "of both softmaxes in the divergence", above=0)

    @property
    def others_lr(self) -> float:
        """The learning rate of what was the teacher's."""
        if self.teacher_lr is not None:
            return self.teacher_lr
        return 0.0 if self.lora.rank else self.lr / 10


@dataclass
class DistillConfig(EndToEndConfig):
    ce_weight: float = setting(
        0.0, "of the cross-entropy on the text itself that is added, in nats per token of text", minimum=0
    )
    hidden_weight: float = setting(
        0.0, "of the hidden states' relative squared error that is added, a mean over layers", minimum=0
    )
    teacher_cache: str | None = setting(
        None,
        "folder of the teacher's cached predictions, read in its place; `transpoint cache-teacher` writes it",
        path="written",
    )
    anneal: AnnealConfig = field(default_factory=AnnealConfig)
    sample_schedules: list[Any] = field(
        default_factory=list,
        metadata={
            "help": "further schedules of a transmamba student, each as student.trans_points takes it: every step "
            "draws one of these and student.trans_points, all equally likely"
        },
    )


@dataclass
class CacheTeacherConfig:
    k: int = setting(64, "most likely tokens kept of each prediction; of the others, the mass", minimum=1)
    hidden: bool = setting(
        False,
        "whether the teacher's last hidden states are kept too: with its output matrix they give its whole predictions",
    )
    dtype: str = setting(
        "float16",
        "of log-probabilities and hidden states in the cache",
        choices=("float32", "bfloat16", "float16"),
    )
    batch_size: int = setting(8, "sequences in one forward pass of the teacher", minimum=1)
    shard_mb: int = setting(256, "megabytes in a shard, at most: an interrupted cache loses one at most", minimum=1)


@dataclass
class SynthesizeConfig:
    out: str | None = setting(None, "folder for the sampled text; null: synthetic, in the run folder", path="written")
    prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "sources of prompts, as in data.train; none: samples start from the beginning of text",
            "path": "read",
        },
    )
    chat: bool = setting(
        False,
        "whether texts are asked as questions; without prompts, whether the teacher writes questions and answers them",
    )
    samples: int = setting(1000, "how many; with fewer prompts, these come again in turn", minimum=1)
    max_prompt_tokens: int = setting(256, "of a text, which is cut, and of a chat, which is left out", minimum=1)
    max_new_tokens: int = setting(512, "of a sample", minimum=1)
    temperature: float = setting(1.0, "of sampling; 0 takes the most likely token", minimum=0)
    top_k: int = setting(0, "most likely tokens that are sampled from; 0: all", minimum=0)
    top_p: float = setting(1.0, "mass of the most likely tokens that are sampled from", above=0, maximum=1)
    batch_size: int = setting(16, "samples at a time", minimum=1)


@dataclass
class ExportConfig:
    format: str = setting(
        "native",
        "native (loads in plain transformers, vLLM), gguf (one file for llama.cpp) or custom (any student; needs "
        "trust_remote_code)",
        choices=FORMATS,
    )
    dtype: str = setting("float32", "of the exported weights; q8_0: of gguf alone", choices=(*DTYPES, *QUANTISED))


@dataclass
class EvaluateConfig:
    sequences: int = setting(16, "held-out sequences that quality is measured on", minimum=1)
    prompts: list[str] = field(
        default_factory=lambda: ["What is the capital of France?"],
        metadata={"help": "chat questions that teacher and student answer"},
    )
    max_new_tokens: int = setting(40, "of each answer", minimum=1)
    lengths: list[int] = field(
        default_factory=list,
        metadata={
            "help": "further lengths of held-out sequences that quality is measured at, on as many tokens",
            "minimum": 2,
        },
    )
    recall: list[str] = field(
        default_factory=lambda: list(RECALL),
        metadata={
            "help": "what is to be found again in a text: passkey (a number), multikey (one of several), pairs (all of "
            "a list, asked in another order)",
            "choices": RECALL,
        },
    )
    recall_lengths: list[int] = field(
        default_factory=lambda: [1024], metadata={"help": "tokens of such texts", "minimum": 16}
    )
    recall_items: int = setting(16, "texts of each kind and length", minimum=1)
    questions: str | None = setting(
        None,
        "source of rows {question, answers} for answers that are scored by exact match; the first three are examples",
        path="read",
    )
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "tasks, groups or tags of lm-evaluation-harness: pip install 'transpoint[eval]'"},
    )
    tasks_folder: str | None = setting(None, "folder with task files of your own", path="read")
    tasks_limit: int | None = setting(None, "documents of each task; null: all", minimum=1)
    cost_lengths: list[int] = field(
        default_factory=lambda: [1024],
        metadata={
            "help": "tokens of context at which time and memory are measured, beside the teacher's",
            "minimum": 1,
        },
    )
    schedules: list[Any] | None = setting(
        None,
        "schedules that a transmamba student is measured at, each as student.trans_points takes it, besides those it "
        "was trained on; null: teacher and mamba",
    )
    cost_length: int | None = setting(
        None, "tokens of context at which the cost of a schedule is measured; null: data.length", minimum=1
    )


def resultless(section: type, values: dict) -> set[str]:
    """Names of the settings of a section that, with these values, change nothing in what a stage makes."""
    return {
        entry.name
        for entry in fields(section)
        if entry.metadata.get("result") is False
        or (entry.metadata.get("added") and values.get(entry.name) == _default(entry))
    }


def _default(entry: Field) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()
