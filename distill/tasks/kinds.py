"""Which tasks there are."""

from .in_context import LinearRegression, OutlierRegression, SparseParity
from .recall import AssociativeRecall, Induction, Needle, SelectiveCopying
from .task import Task

TASKS: dict[str, type[Task]] = {
    "mqar": AssociativeRecall,
    "induction": Induction,
    "copying": SelectiveCopying,
    "needle": Needle,
    "parity": SparseParity,
    "regression": LinearRegression,
    "outliers": OutlierRegression,
}
