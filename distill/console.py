"""Where a person reads what the command line says."""

import os
import sys

from rich.console import Console


def console_of(**options) -> Console:
    """As wide as the terminal; where a program or a file reads, lines and tables stay whole."""
    wide = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 10_000
    return Console(width=wide, **options)
