"""The one error of this package: a teacher that cannot be loaded or understood."""


class TeacherError(ValueError):
    """A teacher cannot be loaded, or its attention is not understood. One line, naming the thing and the remedy."""
