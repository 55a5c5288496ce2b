"""What a token costs as texts grow longer, of a teacher and its students: time in training and in decoding, and memory.

    python scripts/bench_training.py --stage distill --length 2048 8192 32768 --tokens 32768 \\
        --keep-attention [] --json none.json
    python scripts/bench_decoding.py --static --length 2048 8192 32768 131072 --batch 1 \\
        --keep-attention [] --json none-decoding.json
    python scripts/plot_growth.py growth.svg "no attention=none.json,none-decoding.json" "half=half.json"

Draws one line for each name from what the two benchmarks wrote; the teacher's own of decoding comes from the first file
that has it.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

PANELS = ("training, µs a token", "decoding, ms a token", "held in decoding, MiB")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("lines", nargs="+", metavar="NAME=FILE[,FILE...]")
    options = parser.parse_args(arguments)
    lines: dict[str, list[dict[int, float]]] = {}
    for line in options.lines:
        name, _, files = line.rpartition("=")
        for file in files.split(","):
            for record in json.loads(Path(file).read_text())["records"]:
                whose = "teacher" if record.get("model") == "teacher" else name
                panels = lines.setdefault(whose, [{} for _ in PANELS])
                for panel, value in zip(panels, figures(record), strict=True):
                    if value is not None:
                        panel.setdefault(record["length"], value)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.5), layout="constrained")
    for index, (axis, title) in enumerate(zip(axes, PANELS, strict=True)):
        for name, panels in lines.items():
            if points := sorted(panels[index].items()):
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=title, xlabel="tokens of text", xscale="log", yscale="log")
        axis.set_xscale("log", base=2)
        axis.legend()
    figure.savefig(options.out)
    return 0


def figures(record: dict) -> tuple[float | None, float | None, float | None]:
    """For each panel what a record of either benchmark says."""
    if "stage" in record:
        return 1e6 / record["tokens_per_second"], None, None
    return None, record["milliseconds"], record["cache_bytes"] / 2**20


if __name__ == "__main__":
    sys.exit(main())
