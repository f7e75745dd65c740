"""What is raised when weights cannot be read or do not fit."""


class WeightsError(ValueError):
    """A file of weights is damaged, unsafe, or made for another model; the message says which."""
