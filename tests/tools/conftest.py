"""The corpus of the data tests, for the command lines that read or write one."""

from tests.data.conftest import corpus

__all__ = ["corpus"]
