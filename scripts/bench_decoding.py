"""Decoding after long contexts: throughput and memory of a TransMamba student against its teacher.

    python scripts/bench_decoding.py --json docs/results/decoding.json     # on a GPU: 1k, 8k and 32k tokens
    python scripts/bench_decoding.py --quick                               # a tiny model on a CPU, in seconds

Weights do not change how long a token takes, so the student is the teacher's as transferred, unless a trained one is
given. One sequence is run up to the context's length and its cache repeated over the batch; then tokens are decoded
one at a time, and the median time of one counts. Cache: what it holds on to; peak: of the allocator while decoding,
weights included (GPU only). Prints a Markdown table; a ratio of 2 means twice the teacher's throughput, or half its
memory.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from transpoint.distill.measure.cost import cache_bytes
from transpoint.distill.models import load_model
from transpoint.students import StudentConfig, build_student
from transpoint.students.modeling.modeling_hybrid import cache_name
from transpoint.teachers import load_teacher

CHUNK = 4096  # tokens of context run at once


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    teacher, _ = load_teacher(options.teacher, dtype=dtype, device=device)
    if options.student:
        student = load_model(options.student, dtype, trans_points=options.trans_points).to(device)
    else:
        config = StudentConfig(mixer="transmamba", keep_attention=[], trans_points=options.trans_points)
        student = build_student(teacher, config)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{options.teacher}, {dtype}, {name}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"TransPoints: {', '.join(str(point) for point in student.trans_points)}\n")
    records = []
    for batch in options.batch:
        for length in options.length:
            for label, model in (("teacher", teacher), ("student", student)):
                record = measure(model, length, batch, options.tokens)
                records.append({"model": label, "length": length, "batch": batch, **record})
    print("\n".join(table(records)))
    if options.json:
        facts = {"teacher": options.teacher, "student": options.student, "device": name, "dtype": dtype}
        facts |= {"torch": torch.__version__, "transformers": transformers.__version__, "tokens": options.tokens}
        points = [str(point) for point in student.trans_points]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "trans_points": points, "records": records}, indent=1) + "\n")
    return 0


@torch.no_grad()
def measure(model: PreTrainedModel, length: int, batch: int, tokens: int) -> dict:
    """Milliseconds a step of `batch` sequences after `length` tokens, bytes of cache, bytes at the peak (or None)."""
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    cache = model.new_cache() if hasattr(model, "new_cache") else DynamicCache(config=model.config)
    held_in = {cache_name(type(model.get_decoder())): cache, "use_cache": True}
    begun = _now(model)
    for part in ids.split(CHUNK, dim=1):
        model(input_ids=part, **held_in, logits_to_keep=1)
    prefill = _now(model) - begun
    cache.batch_repeat_interleave(batch)
    held = cache_bytes(cache)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = ids[:, :1].expand(batch, -1)
    seconds = []
    for i in range(tokens + 3):  # the first ones compile
        begun = _now(model)
        model(input_ids=step, **held_in, logits_to_keep=1)
        if i >= 3:
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


def table(records: list[dict]) -> list[str]:
    """Markdown: one row for each context and batch, the teacher's figures, the student's, and their ratios."""
    lines = [
        "| context | batch | tokens/s, teacher | student | ratio | cache MiB, teacher | student | ratio "
        "| peak MiB, teacher | student |",
        "|" + "---|" * 10,
    ]
    for teacher, student in zip(records[::2], records[1::2], strict=True):
        cells = [f"{teacher['length']:,}", str(teacher["batch"])]
        cells += [f"{record['tokens_per_second']:,.0f}" for record in (teacher, student)]
        cells.append(f"{student['tokens_per_second'] / teacher['tokens_per_second']:.2f}")
        cells += [f"{record['cache_bytes'] / 2**20:,.1f}" for record in (teacher, student)]
        cells.append(f"{teacher['cache_bytes'] / student['cache_bytes']:.2f}")
        cells += ["-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:,.0f}" for r in (teacher, student)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--teacher", default="smollm2-135m", help="registry name, hub id or folder")
    parser.add_argument("--student", help="a TransMamba checkpoint in place of one built from the teacher")
    parser.add_argument("--trans-points", default="paper-v9", help="name of a schedule")
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 8192, 32768], help="tokens of context")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="sequences decoded together")
    parser.add_argument("--tokens", type=int, default=64, help="decoded for the median")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="a tiny random teacher, short contexts")
    options = parser.parse_args(arguments)
    if options.quick:
        options.teacher, options.student, options.trans_points = "random-llama", None, "uniform:32"
        options.length, options.batch, options.tokens = [64, 256], [1, 2], 8
    return options


if __name__ == "__main__":
    sys.exit(main())
