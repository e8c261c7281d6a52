"""The corpus of the data tests, for runs from the command line."""

from tests.data.conftest import corpus

__all__ = ["corpus"]
