"""What it costs a teacher that its texts do not begin as its tokenizer begins one: `data.bos` true and false.

    python scripts/measure_beginning.py smollm2-135m FOLDER_OR_HUB_ID ... --length 256 --sequences 12

Prints a Markdown table: perplexity on the same sequences of held-out text, which are cut as training text is, so most
of them begin inside of a document.
"""

import argparse
import sys

import torch

from transpoint.distill.data.corpus import tokenize_corpus
from transpoint.distill.data.packed import PackedDataset
from transpoint.distill.measure.held_out import HeldOut
from transpoint.distill.tokenizers import beginning
from transpoint.teachers import load_teacher


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("teacher", nargs="+")
    parser.add_argument("--text", nargs="+", default=["configs/sample/heldout.jsonl.zst"])
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=12)
    options = parser.parse_args(arguments)
    print("| teacher | its tokenizer begins a text with | perplexity | without the beginning |")
    print("|---|---|---|---|")
    for source in options.teacher:
        teacher, tokenizer = load_teacher(source)
        begin = tokenizer.convert_ids_to_tokens(beginning(tokenizer))
        found = []
        for bos in (True, False):
            corpus = tokenize_corpus(options.text, tokenizer, bos=bos)
            dataset = PackedDataset(corpus, options.length)
            with torch.no_grad():
                found.append(HeldOut(dataset, options.sequences, tokenizer).measure(teacher).perplexity)
        name = source.rstrip("/").rsplit("/", 1)[-1]
        print(f"| {name} | {' '.join(begin) or 'nothing'} | {found[0]:.2f} | {found[1]:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
