"""How fast the training stages run, on the processes that started this: tokens a second, memory, share of the peak.

    python scripts/bench_training.py --json docs/results/training.json                   # one GPU
    accelerate launch --config_file configs/accelerate/ddp.yaml scripts/bench_training.py  # several
    python scripts/bench_training.py --stage distill --length 2048 8192 32768 --tokens 32768  # how a step grows
    python scripts/bench_training.py --quick                                             # a tiny model on a CPU

Models have the shape of a teacher and random weights, text is random tokens in documents of random lengths: neither
changes how long a step takes. What is timed is the trainer's own step: objective, engine, clipping, AdamW, without
reading text. A row is the median of several stretches of steps after warm-up. Prints a Markdown table.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
import yaml
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig

from transpoint.distill.config import Recipe
from transpoint.distill.objectives import Alignment, Distillation
from transpoint.distill.stages.preflight import flops_per_token, gpu_name
from transpoint.distill.stages.processes import make_accelerator
from transpoint.distill.train.engines import make_engine
from transpoint.distill.train.groups import distill_groups, mixer_parameters, only_these_train
from transpoint.distill.train.trainer import InPrecision
from transpoint.students import StudentConfig, build_student
from transpoint.students.modeling.configuration_mixers import MIXERS
from transpoint.teachers import share_layers

WINDOWS = 5  # stretches of steps that the median is of
SHAPES = {
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    "tinyllama-1.1b": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000,
    ),
    "llama-3b": dict(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=True,
    ),
    "mistral-7b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000,
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256,
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    recipe = Recipe()
    recipe.student.mixer = options.mixer
    accelerator = make_accelerator(recipe)
    records = []
    for length in options.length:
        batches = [max(1, options.tokens // length)] if options.tokens else options.batch
        for batch, stage in itertools.product(batches, options.stage):
            record = measure(options, stage, batch, length, accelerator)
            records.append(record)
            if accelerator.is_main_process:
                print(json.dumps(record), file=sys.stderr, flush=True)
    if accelerator.is_main_process:
        print("\n".join(table(records, options, accelerator)))
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({**facts(options, accelerator), "records": records}, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace, stage: str, batch: int, length: int, accelerator: Accelerator) -> dict:
    """Tokens a second over all processes, milliseconds of a step, bytes at the peak of each, share of peak FLOPs."""
    device = accelerator.device
    on_gpu = device.type == "cuda"
    if on_gpu:  # what a row before this one left behind is not this one's
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=length)
    teacher = AutoModelForCausalLM.from_config(config).to(device, torch.bfloat16 if on_gpu else None)
    teacher = teacher.eval().requires_grad_(False)
    points = {"trans_points": options.trans_points} if options.mixer == "transmamba" else {}
    chosen = StudentConfig(mixer=options.mixer, keep_attention=options.keep_attention, **points)
    student = build_student(teacher, chosen)
    student = student.float().to(device).train()
    settings = Recipe().distill
    settings.teacher_lr = 1e-4
    if stage == "align":
        objective = Alignment(teacher, student)
        groups = [{"name": "mixers", "parameters": mixer_parameters(student), "lr": 1e-4, "weight_decay": 0.0}]
    else:
        objective, groups = Distillation(teacher, student, settings), distill_groups(student, settings)
    only_these_train(objective, groups)
    if options.share_teacher:
        share_layers(teacher)
    flops = flops_per_token(stage, teacher, student, length)
    module = InPrecision(objective, "bf16" if on_gpu else "fp32", device.type)
    engine = make_engine(module, groups, [0.9, 0.95], 1.0, 1, accelerator, on_gpu and not options.eager)
    batches = [_batch(batch, length, config.vocab_size, seed, device) for seed in range(4)]
    turn = itertools.cycle(batches)

    def run(count: int) -> float:
        """Seconds of a step, among so many that the host does not wait in between, as in training."""
        begun = _now(device)
        for _ in range(count):
            engine.forward_backward(next(turn), last=True)
            engine.step(1.0)
        return (_now(device) - begun) / count

    first = run(1)
    run(options.warmup)
    median = statistics.median(run(options.steps) for _ in range(WINDOWS))
    if options.profile and accelerator.is_main_process:
        options.profile.mkdir(parents=True, exist_ok=True)
        (options.profile / f"{options.mixer}-{stage}-{batch}.txt").write_text(profiled(lambda: run(3)))
    speed = batch * length * accelerator.num_processes / median
    rate = product_rate(device) if on_gpu else None
    record = {
        "stage": stage,
        "length": length,
        "batch": batch,
        "tokens_per_second": speed,
        "step_ms": 1e3 * median,
        "first_step_s": first,
        "allocated": _of_all(torch.cuda.max_memory_allocated(), accelerator) if on_gpu else None,
        "reserved": _of_all(torch.cuda.max_memory_reserved(), accelerator) if on_gpu else None,
        "mfu": flops * speed / (rate * accelerator.num_processes) if rate else None,
    }
    engine.close()
    return record


def product_rate(device: torch.device) -> float:
    """Operations a second of a product of two large bfloat16 matrices, measured: what a GPU can do at best."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(8):
        begun = _now(device)
        for _ in range(5):
            a @ b
        seconds.append((_now(device) - begun) / 5)
    return 2 * 8192**3 / statistics.median(seconds[3:])


def _of_all(value: int, accelerator: Accelerator) -> list[int]:
    """Of each process."""
    return accelerator.gather(torch.tensor([value], device=accelerator.device)).tolist()


def profiled(run) -> str:
    """The kernels that `run` spends its time in."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    return profile.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90)


def table(records: list[dict], options: argparse.Namespace, accelerator: Accelerator) -> list[str]:
    """Markdown: one row for each length, batch and stage; memory of the process that has most."""
    known = facts(options, accelerator)
    lines = [
        f"{known['shape']}, {known['mixer']}, "
        f"{known['processes']} x {known['device']}, torch {known['torch']}, transformers {known['transformers']}",
        "",
        "| stage | tokens a sequence | sequences a process | tokens/s | step, ms | allocated, GB | reserved, GB "
        "| of the bf16 product rate | first step, s |",
        "|" + "---|" * 9,
    ]
    for r in records:
        mfu = r["mfu"]
        cells = [r["stage"], f"{r['length']:,}", str(r["batch"])]
        cells += [f"{r['tokens_per_second']:,.0f}", f"{r['step_ms']:.1f}"]
        cells += ["-" if r[name] is None else f"{max(r[name]) / 1e9:.1f}" for name in ("allocated", "reserved")]
        cells.append("-" if mfu is None else f"{mfu:.1%}")
        lines.append(f"| {' | '.join([*cells, format(r['first_step_s'], '.1f')])} |")
    return lines


def facts(options: argparse.Namespace, accelerator: Accelerator) -> dict:
    """What the figures depend on."""
    names = ("shape", "mixer", "keep_attention", "steps", "eager", "share_teacher")
    chosen = {name: getattr(options, name) for name in names}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    device = gpu_name(accelerator.device) or "CPU"
    return chosen | {"device": device, "processes": accelerator.num_processes} | versions


def _batch(sequences: int, length: int, vocabulary: int, seed: int, device: torch.device) -> dict:
    """Random tokens in documents of 600 on average."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (sequences, length), generator=generator)
    starts = torch.rand(sequences, length, generator=generator) < 1 / 600
    starts[:, 0] = True
    column = torch.arange(length)
    positions = column - torch.where(starts, column, 0).cummax(1).values
    return {"input_ids": ids.to(device), "position_ids": positions.to(device)}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="whose shape the teacher has")
    parser.add_argument("--mixer", choices=MIXERS, default="mamba2", help="softmax in all layers is the teacher itself")
    parser.add_argument("--keep-attention", type=yaml.safe_load, help="as student.keep_attention takes it")
    parser.add_argument("--trans-points", default="log:1024", help="schedule of a transmamba student")
    parser.add_argument("--stage", nargs="+", choices=("align", "distill"), default=["align", "distill"])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16], help="sequences in a step of a process")
    parser.add_argument("--tokens", type=int, help="in a step of a process, in place of --batch")
    parser.add_argument("--length", type=int, nargs="+", default=[2048], help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=5, help="in each of the stretches that are timed")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--eager", action="store_true", help="nothing compiled, no CUDA graphs")
    parser.add_argument("--share-teacher", action="store_true", help="each process has a share of the teacher's layers")
    parser.add_argument("--profile", type=Path, help="folder for what each row's time goes into")
    parser.add_argument("--quick", action="store_true", help="a tiny model, short sequences")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.batch, options.length, options.steps, options.warmup = "tiny", [1, 2], [64], 1, 1
    return options


if __name__ == "__main__":
    sys.exit(main())
