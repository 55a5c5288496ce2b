"""Time `transpoint.kernels` and every installed peer in one process, and check ours against float64 first.

    python -m scripts.bench                        # all rows; writes docs/results/kernels-<gpu>.json and the table
    python -m scripts.bench --only 'ssd_scan'      # some rows, printed only
    python -m scripts.bench --table                # the table in docs/results/kernels.md again, from the JSON
    python -m scripts.bench --quick --device cpu   # tiny shapes: does it run?

Run it from the repository root. Peers are whatever can be imported of mamba_ssm, fla-core, liger-kernel and
causal-conv1d, PyTorch's attention, and plain PyTorch. What a peer cannot do is reported as a refusal with its reason;
it never ends the run.

How it is measured: random bfloat16 inputs, several sets in turn where one would fit in the L2 cache; the median over
samples after warm-up, timed with CUDA events. "graph" replays a captured CUDA graph; "eager" launches from Python, call
after call, without waiting in between. The floor is the larger of bytes / copy rate and operations / matmul rate, both
rates measured in the same run. Memory is what one call allocates at its peak, outputs and gradients included.
"""

import argparse
import importlib
import importlib.metadata
import json
import math
import re
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from . import rows
from .cases import Maker
from .first_step import first_step, training_step
from .judge import is_wrong
from .meter import Meter
from .peers import tame_autotuners
from .run import run_case, say, short
from .tables import rates_text, summary, write_table

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
PACKAGES = ("mamba-ssm", "fla-core", "liger-kernel", "causal-conv1d", "triton", "torch")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.table:
        print(write_table(args.out or RESULTS))
        return 0
    if args.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(args.device).index or 0)
    if args.first_step:
        torch.zeros(1, device=args.device)  # the GPU's start is not ours
        print(training_step(args.device))
        return 0
    return bench(args)


def bench(args: argparse.Namespace) -> int:
    """Run the chosen rows; returns 1 if any of ours is wrong or missing."""
    start = time.perf_counter()
    cuda = args.device.startswith("cuda")
    if cuda:
        tame_autotuners()
    meter, maker = Meter(args.device, patience_ms=1 if args.quick else 100), Maker(args.device)
    report = {
        "gpu": torch.cuda.get_device_name() if cuda else "CPU",
        "command": command(args),
        "versions": {package: version(package) for package in PACKAGES},
        "ceilings": meter.ceilings(),
        "skipped": [],
        "records": [],
    }
    meter.free()
    if cuda and not args.only:
        report["first_step"] = first_step(args.device)
    say(f"{report['gpu']}: {rates_text(report['ceilings'])}")
    out = args.out or (None if args.only or args.quick or args.no_peers else RESULTS)
    peers = "" if args.no_peers else ".*" if cuda else "PyTorch"
    for case in rows.quick(maker) if args.quick else rows.full(maker):
        if args.only and not re.search(args.only, case.name):
            continue
        if time.perf_counter() - start > args.budget:
            report["skipped"].append(f"{case.name} (over budget)")
            continue
        say(f"{case.name}  [{time.perf_counter() - start:.0f} s]")
        try:
            report["records"] += run_case(case, meter, report["ceilings"], peers)
        except Exception as error:  # the GPU itself: nothing that follows would run
            say(f"  broken: {short(error)}")
            report["skipped"] += [f"{case.name} (broken: {short(error)})", "all that follows"]
            break
        report["seconds"] = time.perf_counter() - start
        if out:  # after every row: a run that is cut off keeps what it has
            out.mkdir(parents=True, exist_ok=True)
            (out / f"kernels-{slug(report['gpu'])}.json").write_text(json.dumps(report, indent=1))
    if out:
        write_table(out)
    say("")
    say(summary(report))
    wrong = sorted({f"{r['op']} {r['shape']}" for r in report["records"] if is_wrong(r)})
    if wrong:
        say("WRONG or not there: " + "; ".join(wrong))
    say(f"{time.perf_counter() - start:.0f} s")
    return 1 if wrong or "all that follows" in report["skipped"] else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m scripts.bench", description="Time the kernels and their peers.")
    parser.add_argument("--only", metavar="REGEX", help='rows whose "op shape" matches; printed only, unless --out')
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the JSON and the table (docs/results)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; printed only, unless --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--no-peers", action="store_true", help="time ours alone")
    parser.add_argument("--first-step", action="store_true", help="only print the seconds of a first training step")
    parser.add_argument("--table", action="store_true", help="only make the table again from the JSON")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start no row after that")
    args = parser.parse_args(argv)
    if args.device.startswith("cpu") and not (args.quick or args.table or args.first_step):
        parser.error("on the CPU only --quick shapes are worth the wait")
    return args


def command(args: argparse.Namespace) -> str:
    """What to type for the same rows, wherever the results go."""
    words = ["python -m scripts.bench"]
    if args.only:
        words.append(f"--only {shlex.quote(args.only)}")
    if args.device != "cuda":
        words.append(f"--device {args.device}")
    if args.budget < math.inf:
        words.append(f"--budget {args.budget:g}")
    words += ["--quick"] * args.quick + ["--no-peers"] * args.no_peers
    return " ".join(words)


def slug(gpu: str) -> str:
    """NVIDIA H200 -> h200, NVIDIA H100 80GB HBM3 -> h100."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    return next(word for word in words if word not in ("nvidia", "amd", "tesla", "geforce"))


def version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    with suppress(ImportError):  # its source alone may be on the path
        return getattr(importlib.import_module(package.replace("-", "_")), "__version__", None)
    return None


if __name__ == "__main__":
    sys.exit(main())
