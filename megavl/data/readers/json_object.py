"""JSON objects, read strictly: what another program could understand differently is refused."""

import json
import reprlib
from typing import Any

from megavl.data.errors import DataError


class RepeatedKey(DataError):
    """A JSON object gives a key twice; programs disagree on which value counts."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RepeatedKey(f"the key {json.dumps(repeated)} is repeated in one object; give it once")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_object)
_ANY = json.JSONDecoder()


def parse(data: bytes) -> dict[str, Any]:
    """The object in the bytes.

    Raises:
        DataError: they are not UTF-8, not JSON, another value than an object, or repeat a key. The message does not
            name the record.
    """
    try:
        return checked(_STRICT.decode(data.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8 (byte {error.object[error.start]:#04x} at offset {error.start} of the record); convert the "
            "file, for example with iconv"
        ) from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error}); a record is one JSON object") from error


def parse_next(text: str, start: int) -> tuple[Any, int]:
    """(value, its end) of the value that begins at `start`; for one with a repeated key, the error.

    Raises:
        json.JSONDecodeError: no value begins there, or its end is not in the text.
    """
    try:
        return _STRICT.raw_decode(text, start)
    except RepeatedKey as error:
        return error, _ANY.raw_decode(text, start)[1]


def checked(value: Any) -> dict[str, Any]:
    """The value itself, if it is an object.

    Raises:
        DataError: it is not. The message does not name the record.
    """
    if not isinstance(value, dict):
        raise DataError(f"is {described(value)}; a record is one JSON object")
    return value


class _Short(reprlib.Repr):
    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"<{len(value)} bytes>"


def described(value: object) -> str:
    """What a value is, in JSON's words and with as much of it as fits: `a list ([1, 2])`."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", bool: "a boolean", str: "a string", bytes: "bytes"}
    return f"{names.get(type(value), 'a number')} ({_Short().repr(value)})"
