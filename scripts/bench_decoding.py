"""Decoding after long contexts: throughput and memory of a student against its teacher.

    python scripts/bench_decoding.py --static --json docs/results/decoding-static.json
    python scripts/bench_decoding.py --mixer transmamba --json docs/results/decoding.json
    python scripts/bench_decoding.py --quick                               # a tiny model on a CPU, in seconds

Weights do not change how long a token takes, so the student is the teacher's as transferred, unless a trained one is
given. One sequence is run up to the context's length and its cache repeated over the batch; then tokens are decoded
one at a time, and the median time of one counts. With --static both have a static cache and, on a GPU, a step compiled
as `generate` compiles it; else both have one that grows, and each operation is launched from Python. Generate: what a
token takes there, from what 16 and 144 tokens take after the first context. Cache: what it holds on to; peak: of the
allocator while decoding, weights included (GPU only). Prints a Markdown table; a ratio of 2 means twice the teacher's
throughput, or half its memory.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
import yaml
from transformers import Cache, CompileConfig, PreTrainedModel

from transpoint.distill.measure.cost import cache_bytes, new_cache
from transpoint.distill.models import load_model
from transpoint.students import StudentConfig, build_student
from transpoint.students.modeling.cache_layers import mark_static
from transpoint.students.modeling.modeling_hybrid import cache_name
from transpoint.teachers import load_teacher

CHUNK = 4096  # tokens of context run at once
WARM_UP = 5  # tokens: the first ones compile and record
HEADER = [
    "| context | batch | tokens/s, teacher | student | ratio | cache MiB, teacher | student | ratio "
    "| peak MiB, teacher | student |",
    "|" + "---|" * 10,
]


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    teacher, _ = load_teacher(options.teacher, dtype=dtype, device=device)
    if options.student:
        student = load_model(options.student, dtype, trans_points=options.trans_points).to(device)
    else:
        points = {"keep_attention": [], "trans_points": options.trans_points}
        own = points if options.mixer == "transmamba" else {"keep_attention": options.keep_attention}
        student = build_student(teacher, StudentConfig(mixer=options.mixer, **own))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{options.teacher}, {dtype}, {name}, torch {torch.__version__}, transformers {transformers.__version__}")
    points = [str(point) for point in student.trans_points]
    print(f"TransPoints (inf: attention): {', '.join(points)}\n")
    records, models = [], {"teacher": teacher, "student": student}
    print("\n".join(HEADER), flush=True)
    for batch in options.batch:
        for length in options.length:
            for label, model in models.items():
                record = measure(model, length, batch, options.tokens, options.static)
                records.append({"model": label, "length": length, "batch": batch, **record})
            print(row(*records[-2:]), flush=True)
    generating = {name: generate(model, options.length[0], options.static) for name, model in models.items()}
    told = ", ".join(f"{name} {milliseconds:.2f}" for name, milliseconds in generating.items())
    print(f"\ngenerate, milliseconds a token of one sequence after {options.length[0]:,}: {told}")
    if options.json:
        facts = {"teacher": options.teacher, "student": options.student, "device": name, "dtype": dtype}
        facts |= {"torch": torch.__version__, "transformers": transformers.__version__, "tokens": options.tokens}
        facts |= {"mixers": student.config.mixers, "static": options.static, "generate": generating}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "trans_points": points, "records": records}, indent=1) + "\n")
    return 0


@torch.no_grad()
def measure(model: PreTrainedModel, length: int, batch: int, tokens: int, static: bool = False) -> dict:
    """Milliseconds a step of `batch` sequences after `length` tokens, bytes of cache, bytes at the peak (or None)."""
    ids = _prompt(model, length)
    cache = new_cache(model, length + tokens + WARM_UP if static else None)
    held_in = {cache_name(type(model.get_decoder())): cache, "use_cache": True}
    begun = _now(model)
    for part in ids.split(CHUNK, dim=1):
        model(input_ids=part, **held_in, logits_to_keep=1)
    prefill = _now(model) - begun
    _repeat(cache, batch, model.device)
    forward = model.get_compiled_call(CompileConfig()) if static and model.device.type == "cuda" else model
    held = cache_bytes(cache)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = ids[:, :1].expand(batch, -1)
    seconds = []
    for i in range(tokens + WARM_UP):
        begun = _now(model)
        forward(input_ids=step, **held_in, logits_to_keep=1)
        if i >= WARM_UP:
            seconds.append(_now(model) - begun)
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    median = statistics.median(seconds)
    return {
        "milliseconds": 1e3 * median,
        "tokens_per_second": batch / median,
        "prefill_seconds": prefill,  # the first of a length compiles
        "cache_bytes": held,
        "peak_bytes": peak,
    }


@torch.no_grad()
def generate(model: PreTrainedModel, length: int, static: bool) -> float:
    """Milliseconds a token of one sequence takes in `generate`, with all that it does besides."""
    ids, seconds = _prompt(model, length), {}
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"cache_implementation": "static"} if static else {}
    for tokens in (144, 16, 144, 16):  # the first ones compile, for a cache that is kept as long
        begun = _now(model)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)
        seconds[tokens] = _now(model) - begun
    return 1e3 * (seconds[144] - seconds[16]) / 128


def row(teacher: dict, student: dict) -> str:
    """Of Markdown, for a context and batch: the teacher's figures, the student's, and their ratios."""
    cells = [f"{teacher['length']:,}", str(teacher["batch"])]
    cells += [f"{record['tokens_per_second']:,.0f}" for record in (teacher, student)]
    cells.append(f"{student['tokens_per_second'] / teacher['tokens_per_second']:.2f}")
    cells += [f"{record['cache_bytes'] / 2**20:,.1f}" for record in (teacher, student)]
    cells.append(f"{teacher['cache_bytes'] / student['cache_bytes']:.2f}")
    cells += ["-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:,.0f}" for r in (teacher, student)]
    return f"| {' | '.join(cells)} |"


def _prompt(model: PreTrainedModel, length: int) -> torch.Tensor:
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def _repeat(cache: Cache, batch: int, device: torch.device) -> None:
    """One row becomes `batch` rows."""
    cache.reorder_cache(torch.zeros(batch, dtype=torch.long, device=device))
    for layer in cache.layers:
        mark_static(layer)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--teacher", default="smollm2-135m", help="registry name, hub id or folder")
    parser.add_argument("--student", help="a checkpoint in place of one built from the teacher")
    parser.add_argument("--mixer", default="mamba2", help="of the student that is built")
    parser.add_argument(
        "--keep-attention", type=yaml.safe_load, default="every:2", help="layers of it that do (not transmamba)"
    )
    parser.add_argument("--trans-points", default="paper-v9", help="name of a schedule")
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 8192, 32768], help="tokens of context")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="sequences decoded together")
    parser.add_argument("--tokens", type=int, default=64, help="decoded for the median")
    parser.add_argument("--static", action="store_true", help="static caches, steps compiled")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="a tiny random teacher, short contexts")
    options = parser.parse_args(arguments)
    if options.quick:
        options.teacher, options.student, options.trans_points = "random-llama", None, "uniform:32"
        options.mixer = "transmamba"
        options.length, options.batch, options.tokens = [64, 256], [1, 2], 8
    return options


if __name__ == "__main__":
    sys.exit(main())
