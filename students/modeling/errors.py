"""The one error of this package: a student that cannot be built."""


class StudentError(ValueError):
    """A student cannot be built or loaded. One line, naming the thing and the remedy."""
