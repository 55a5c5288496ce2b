"""What becomes of the next tokens where the memories of two texts are put together, in place of reading both.

    python scripts/measure_states.py STUDENT --text configs/sample/heldout.jsonl.zst --length 128 --pairs 16

Takes pairs of neighbouring stretches A and B of a text, and tokens after them. Prints a Markdown table: KL in nats a
token, from the predictions after A and B were read together: of the second token after them, once the first is read,
and the mean of as many as `--after`.
"""

import argparse
import sys

import torch

from transpoint.distill.data.corpus import tokenize_corpus
from transpoint.distill.models import load_model, load_tokenizer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("student", help="folder of a student")
    parser.add_argument("--text", nargs="+", default=["configs/sample/heldout.jsonl.zst"])
    parser.add_argument("--length", type=int, default=128, help="tokens of A, and of B")
    parser.add_argument("--after", type=int, default=32, help="tokens that are predicted after them")
    parser.add_argument("--pairs", type=int, default=16)
    options = parser.parse_args(arguments)
    model, length, after = load_model(options.student, "float32"), options.length, options.after
    tokens = tokenize_corpus(options.text, load_tokenizer(options.student)).tokens
    step = (len(tokens) - 2 * length - after) // options.pairs
    rows = torch.stack([tokens[i * step :][: 2 * length + after] for i in range(options.pairs)]).long()
    a, b, more = rows.split([length, length, after], 1)

    def read(ids, start=0, cache=None):
        cache = model.new_cache(mergeable=True) if cache is None else cache
        positions = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
        with torch.no_grad():
            return cache, model(ids, cache=cache, position_ids=positions).logits.log_softmax(-1)

    first, second, anew = read(a)[0], read(b, length)[0], read(b)[0]
    # Of the first token after them each memory has the prediction of the second one.
    _, expected = read(more, 2 * length, read(torch.cat((a, b), 1))[0])
    caches = {
        "A merged with B": (first.merge(second), 2 * length),
        "A merged with B, read from position 0": (first.merge(anew), 2 * length),
        "half A, half B": (first.interpolate(second, 0.5), 2 * length),
        "B alone": (second.fork(), 2 * length),
        "A alone": (first.fork(), 2 * length),
        "nothing": (model.new_cache(), 0),
    }
    print(f"| memory | KL after one more token | KL, mean of {after} |\n|---|---|---|")
    for name, (cache, start) in caches.items():
        kl = (expected.exp() * (expected - read(more, start, cache)[1])).sum(-1).mean(0)
        print(f"| {name} | {kl[0]:.5f} | {kl.mean():.5f} |", flush=True)
    found = first.merge(second).difference(read(torch.cat((a, b), 1))[0])
    shown = " ".join("-" if part is None else f"{part.relative.mean():.3f}" for part in found)
    print(f"\nrelative distance of states by layer, merged from read: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
