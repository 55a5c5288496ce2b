"""`python -m transpoint.distill CONFIG key=value ...` is `transpoint run ...`: what `accelerate launch -m` starts."""

import sys

from .cli import COMMANDS, main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        arguments = ["run", *arguments]
    sys.exit(main(arguments))
