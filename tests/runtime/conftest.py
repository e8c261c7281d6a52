"""The corpus of the data tests, for whole runs."""

from tests.data.conftest import corpus

__all__ = ["corpus"]
