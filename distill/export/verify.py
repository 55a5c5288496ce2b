"""Whether what was written is the student, to whoever has nothing but transformers: logits, decoding and tokenizer."""

import copy
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ...students import HybridForCausalLM
from ...students.modeling.configuration_mixers import have_trans_points
from ..run.files import read_json, write_json
from ..tokenizers import PROBES, first_difference, save_tokenizer, tokenizer_facts
from .formats import ExportError

Weights = Callable[[HybridForCausalLM, torch.dtype], dict[str, Tensor]]
TOLERANCE = 1e-4  # of logits in float32, relative to the largest


def check_tokenizer_with(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ExportError where a tokenizer would not be itself beside this config, which needs no weights to be found
    out."""
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        save_tokenizer(tokenizer, scratch)
        found = AutoTokenizer.from_pretrained(scratch)
        _refuse_another(tokenizer, json.loads(json.dumps(tokenizer_facts(found, PROBES))))


def _refuse_another(tokenizer: PreTrainedTokenizerBase, found: dict) -> None:
    own = json.loads(json.dumps(tokenizer_facts(tokenizer, PROBES)))
    if (name := first_difference(own, found)) is not None:
        raise ExportError(
            f"the tokenizer is another one when it is loaded with what was written: its {name} differ; save the "
            "teacher's tokenizer as PreTrainedTokenizerFast, or use another format"
        )


def verify(
    student: HybridForCausalLM,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weights: Weights | None = None,
) -> dict[str, float]:
    """Compares the model in `folder`, loaded in a fresh process without Transpoint, with the student, in float32, and
    its tokenizer with the student's.

    A student with TransPoints is compared a second time with early ones, so that every layer passes its own.

    Args:
        weights: how its weights are laid out when they are written, as in `Home`; the student that they make is itself
            compared with this one. `rounded` unless given.

    Returns the figures of `export`. Raises ExportError if the folder does not load or is not equal.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(48, student.config.max_position_embeddings)
    ids = torch.randint(3, student.config.vocab_size, (2, length), generator=generator)
    expected = {"ids": ids, "logits": _logits_as_written(student, ids, dtype, weights)}
    if weights is not None:
        own, laid_out = (_logits_as_written(student, ids, torch.float32, how) for how in (None, weights))
        _refuse_unequal("logits", (own - laid_out).abs().max().item(), own.abs().max().item())
    if have_trans_points(student.config.mixers):
        early = 5 * length // 8
        expected |= {
            "early": torch.tensor(early),
            "early_logits": _logits_as_written(student, ids, dtype, weights, early),
        }
    with tempfile.TemporaryDirectory() as scratch:
        save_file(expected, f"{scratch}/expected.safetensors")
        write_json(Path(scratch) / "probes.json", PROBES)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        command = [sys.executable, "-c", _VERIFY, str(folder.resolve()), scratch]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ExportError(f"what was written does not load without Transpoint: {last}")
        figures = read_json(Path(scratch) / "figures.json")
        if tokenizer is not None:
            _refuse_another(tokenizer, read_json(Path(scratch) / "tokenizer.json"))
    for name in ("logits", "decode"):
        _refuse_unequal(name, figures[name], figures["scale"])
    return figures


def _refuse_unequal(name: str, difference: float, scale: float) -> None:
    bound = TOLERANCE * max(1.0, scale)
    if not difference <= bound:
        raise ExportError(
            f"what was written is not equal to the student: {name} differ by {difference:.2e}, more than {bound:.2e}"
        )


# Runs where Transpoint is not: what a user who has only transformers would see.
_VERIFY = (
    f"""
{inspect.getsource(tokenizer_facts)}
"""
    + """
import gc, json, os, sys
gc.disable()  # it ends soon: while importing, collections take a second
# Nor are kernels that transformers takes where they are installed: on a CPU, too, where they do not run.
for name in ("transpoint", "mamba_ssm", "causal_conv1d", "fla"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, scratch = sys.argv[1:]
expected = load_file(scratch + "/expected.safetensors")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
facts = tokenizer_facts(tokenizer, json.load(open(scratch + "/probes.json")))
with open(scratch + "/tokenizer.json", "w") as file:
    json.dump(facts, file)
ids = expected["ids"]
@torch.no_grad()
def compare(logits):
    full = model(ids, use_cache=False).logits
    prefill = model(ids[:, : ids.shape[1] // 2], use_cache=True)
    name = "cache" if "cache" in prefill else "past_key_values"  # before transformers 5.24
    cache, steps = prefill[name], [prefill.logits]
    for i in range(ids.shape[1] // 2, ids.shape[1]):
        steps.append(model(ids[:, i : i + 1], **{name: cache}, use_cache=True).logits)
    return (full - logits).abs().max().item(), (torch.cat(steps, dim=1) - full).abs().max().item()
found = [compare(expected["logits"])]
if "early" in expected:
    model.set_trans_points(expected["early"].item(), warn=False)
    found.append(compare(expected["early_logits"]))
figures = dict(zip(("logits", "decode"), map(max, zip(*found))), scale=expected["logits"].abs().max().item())
with open(scratch + "/figures.json", "w") as file:
    json.dump(figures, file)
os._exit(0)  # without a second of taking everything down
"""
)


def as_written(student: HybridForCausalLM, dtype: torch.dtype, weights: Weights | None = None) -> HybridForCausalLM:
    """The student in float32, on the CPU, its weights as they are written: as `weights` has them, or else rounded."""
    model = type(student)._from_config(copy.deepcopy(student.config), dtype=torch.float32).eval()
    written = (weights or rounded)(student, dtype)
    model.load_state_dict({name: tensor.cpu().float() for name, tensor in written.items()})
    return model


@torch.no_grad()
def _logits_as_written(
    student: HybridForCausalLM,
    ids: Tensor,
    dtype: torch.dtype,
    weights: Weights | None = None,
    trans_points: int | None = None,
) -> Tensor:
    model = as_written(student, dtype, weights)
    if trans_points is not None:
        model.set_trans_points(trans_points, warn=False)
    return model(ids, use_cache=False).logits.contiguous()


def rounded(
    student: HybridForCausalLM,
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
    exact: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """A student's weights, or a state made of them, as they are written: in a dtype, but for what its mixers want in
    float32 (bfloat16 loses decay, step and skip), and what else is `exact`: ends of names. A tensor that has several
    names stays one, and so is written once."""
    exact += tuple(f".{name}" for mixer in student.mixer_layers() if mixer is not None for name in mixer.exact)
    state = student.state_dict() if state is None else state
    made: dict[tuple, Tensor] = {}
    found = {}
    for name, tensor in state.items():
        kind = torch.float32 if name.endswith(exact) else dtype
        where = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), kind)
        found[name] = made.setdefault(where, tensor.to(kind))
    return found
