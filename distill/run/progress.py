"""A progress bar on a terminal, a line now and then elsewhere: step, loss, tokens per second, time left."""

import time
from datetime import timedelta

from rich import progress as rich_progress
from rich.console import Console

LINE_EVERY = 15.0  # seconds between lines where there is no terminal


class Progress:
    """Shows how far a stage is. Use it as a context manager."""

    def __init__(self, console: Console, title: str, total: int, done: int, tokens_per_step: int):
        self.console, self.title, self.total = console, title, total
        self.tokens_per_step = tokens_per_step
        self.first, self.begun, self.printed = done, time.monotonic(), 0.0
        self.loss: float | None = None
        self.bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[figures]}"),
            rich_progress.TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task(title, total=total, completed=done, figures="")

    def __enter__(self) -> "Progress":
        self.bar.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.__exit__(*exception)

    def show(self, step: int, loss: float | None = None) -> None:
        """`step` steps are done; `loss` where it is known."""
        self.loss = loss if loss is not None else self.loss
        now = time.monotonic()
        speed = (step - self.first) / max(now - self.begun, 1e-9)
        figures = f"{speed * self.tokens_per_step:,.0f} tokens/s"
        if self.loss is not None:
            figures = f"loss {self.loss:.4f}  {figures}"
        self.bar.update(self.task, completed=step, figures=figures)
        if not self.console.is_terminal and (now - self.printed > LINE_EVERY or step == self.total):
            left = timedelta(seconds=round((self.total - step) / max(speed, 1e-9)))
            self.console.print(f"{self.title}: step {step}/{self.total}  {figures}  {left} left", highlight=False)
            self.printed = now
