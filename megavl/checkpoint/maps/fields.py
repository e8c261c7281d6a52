"""Reading the JSON configuration of another project."""

from typing import Any

from megavl.checkpoint.error import CheckpointError


class Fields:
    """The fields of one JSON object. One that is null counts as absent, since transformers writes both."""

    def __init__(self, values: dict | None, where: str):
        self._values = values or {}
        self._where = where

    def get(self, name: str, default: Any) -> Any:
        """A field, or the value that the other project takes where it is absent."""
        value = self._values.get(name)
        return default if value is None else value

    def section(self, name: str) -> "Fields":
        """A nested object; empty where it is absent."""
        return Fields(self._values.get(name), f"{self._where} {name}")

    def choose(self, name: str, meanings: dict[str, Any], default: str) -> Any:
        """What a field of one of these values means.

        Raises:
            CheckpointError: naming the field, its value and these.
        """
        value = self.get(name, default)
        if value not in meanings:
            raise CheckpointError(
                f"{self._where}: {name} is {value!r}, and megavl computes only {' or '.join(map(repr, meanings))}. "
                "Nothing was converted"
            )
        return meanings[value]

    def require(self, name: str, wanted: Any, default: Any) -> None:
        """Refuse a field of any value but `wanted`.

        Raises:
            CheckpointError: naming the field and both values.
        """
        value = self.get(name, default)
        if value != wanted:
            raise CheckpointError(
                f"{self._where}: {name} is {value!r}, and megavl computes only {wanted!r}. Nothing was converted"
            )
