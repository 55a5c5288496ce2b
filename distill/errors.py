"""What goes wrong in ways that a person can mend."""


class DistillError(Exception):
    """The base of this package's errors. One line, naming the thing and the remedy."""


class RunError(DistillError, ValueError):
    """A run, or its folder, that cannot be used as asked."""
