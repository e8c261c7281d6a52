"""DataError: what every room of the data path raises for input that it refuses."""


class DataError(ValueError):
    """Input data that cannot be trained on. The message names the file or key, what is wrong, and what helps."""
