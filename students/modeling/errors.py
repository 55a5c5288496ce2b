"""The one error of students."""


class StudentError(ValueError):
    """A student cannot be built or loaded. One line, naming the thing and the remedy."""
