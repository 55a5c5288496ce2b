"""Does it pay to anneal the TransPoints? A small teacher of real text, distilled with and without, seed by seed.

    python scripts/compare_annealing.py                      # the rows of docs/transmamba.md, 12 minutes on one core
    python scripts/compare_annealing.py --seeds 0 --steps 20 --teacher-steps 20    # a look

The teacher is a Llama of 16 layers, trained on the shipped sample first. Students are calibrated, not aligned, and
distilled on the same tokens in the same order; only the TransPoints on the way differ. Prints held-out KL in Markdown.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from rich.console import Console

from transpoint.distill.config import load_recipe
from transpoint.distill.data.corpus import tokenize_corpus
from transpoint.distill.data.packed import PackedDataset, batch_indices, collate
from transpoint.distill.stages.runner import run_recipe
from transpoint.teachers.random import random_teacher

ROOT = Path(__file__).resolve().parent.parent
CYCLED = f"[{', '.join(['0, 16, 32, 64'] * 4)}]"
SETTINGS = (("8", "3e-3"), ("8", "1e-2"), (CYCLED, "3e-3"))  # TransPoints, learning rate


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(1)
    print("| TransPoints | learning rate | seed | no annealing | over half of the steps |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        train_teacher(Path(folder) / "teacher", options.teacher_steps, options.tokens)
        for points, rate in SETTINGS:
            for seed in options.seeds:
                kls = [distill(Path(folder), points, rate, seed, options, f) for f in ("null", "0.5")]
                name = "0, 16, 32, 64 cycled" if points == CYCLED else points
                print(f"| {name} | {rate} | {seed} | " + " | ".join(f"{kl:.4f}" for kl in kls) + " |", flush=True)
    return 0


def train_teacher(folder: Path, steps: int, tokens: int) -> None:
    """Trains a small Llama on the sample's bytes and saves it."""
    model, tokenizer = random_teacher("random-llama", num_hidden_layers=16, initializer_range=0.02)
    corpus = tokenize_corpus([str(ROOT / "configs/sample/train.jsonl.zst")], tokenizer, max_tokens=tokens)
    dataset = PackedDataset(corpus, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        batch = collate([dataset[i] for i in batch_indices(len(dataset), 8, 0, step)])
        logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def distill(folder: Path, points: str, rate: str, seed: int, options: argparse.Namespace, fraction: str) -> float:
    """Held-out KL of a student after distillation."""
    AcceleratorState._reset_state(reset_partial_state=True)
    overrides = {
        "run.dir": folder / "run",
        "run.seed": seed,
        "teacher.source": folder / "teacher",
        "student.trans_points": points,
        "data.cache": folder / "cache",
        "data.length": 128,
        "data.max_train_tokens": options.tokens,
        "data.max_heldout_tokens": 10_000,
        "evaluate.sequences": options.sequences,
        "align.steps": 0,
        "distill.steps": options.steps,
        "distill.batch_size": 8,
        "distill.lr": rate,
        "distill.teacher_lr": rate,
        "distill.anneal.fraction": fraction,
    }
    recipe = load_recipe(ROOT / "configs/tiny-transmamba.yaml", [f"{key}={value}" for key, value in overrides.items()])
    run_recipe(recipe, until_stage="distill", console=Console(file=io.StringIO()))
    return json.loads((folder / "run/distill/done.json").read_text())["quality"]["kl"]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data order")
    parser.add_argument("--steps", type=int, default=100, help="of distillation, 1,024 tokens each")
    parser.add_argument("--teacher-steps", type=int, default=600, help="of the teacher's training, likewise")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of training text")
    parser.add_argument("--sequences", type=int, default=30, help="held-out ones that are measured")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
