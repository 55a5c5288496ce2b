"""How well counts of bytes foretell a recipe's held-out text: what a model trained on bytes has to be better than.

    python scripts/count_bytes.py configs/scratch.yaml

Prints a Markdown table: bits per byte where each byte is foretold from the n - 1 before it, as often as it follows them
in the training text, with 0.01 added to the count of each of 256.
"""

import argparse
import math
import sys
from collections import Counter

from transpoint.distill.config import Recipe, load_recipe
from transpoint.distill.data.sources import read, resolve

ADDED = 0.01


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--longest", type=int, default=4, help="n, at most")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.config, options.overrides)
    print("| n | bits per byte |\n|---|---|")
    for n in range(1, options.longest + 1):
        print(f"| {n} | {bits_per_byte(recipe, n):.2f} |")
    return 0


def bits_per_byte(recipe: Recipe, n: int) -> float:
    """Of the held-out text, all of it that the recipe reads."""
    data = recipe.data
    seen, before, bits = Counter(), Counter(), []
    for text in _documents(data.train, data.text_field, data.max_train_tokens):
        for end in range(n, len(text) + 1):
            seen[text[end - n : end]] += 1
            before[text[end - n : end - 1]] += 1
    for text in _documents(data.heldout, data.text_field, data.max_heldout_tokens):
        for end in range(n, len(text) + 1):
            own, context = seen[text[end - n : end]], before[text[end - n : end - 1]]
            bits.append(-math.log2((own + ADDED) / (context + 256 * ADDED)))
    return sum(bits) / len(bits)


def _documents(sources: list[str], field: str, most: int | None):
    """The bytes of each document, `most` in all."""
    left = math.inf if most is None else most
    for item in (item for source in sources for item in resolve(source)):
        for _, row in read(item, (field,)):
            text = row[field].encode()
            yield text[: int(min(left, len(text)))]
            left -= min(left, len(text))
            if not left:
                return


if __name__ == "__main__":
    sys.exit(main())
