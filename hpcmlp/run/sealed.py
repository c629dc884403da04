"""Small JSON files that carry a digest of themselves: the manifest of a checkpoint, the record of all of them."""

import hashlib
import json
import os
from typing import Any

_LIMIT_BYTES = 1 << 20
_SEAL = "check"


class Damaged(Exception):
    """A sealed file that is there and not what was written; the text says how."""


def seal(values: dict[str, Any]) -> bytes:
    """Return JSON `values` as one line with the sha256 of all the rest of it as `check`. Local."""
    return _text({**values, _SEAL: _digest(values)})


def read_sealed(path: str | os.PathLike) -> dict[str, Any] | None:
    """Return the values of a sealed file, without the seal; None when there is none.

    Local. Raises Damaged. A file of before there were seals is taken as it is: whoever reads it compares what it says.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            text = file.read(_LIMIT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror})") from None
    try:
        values = json.loads(text) if len(text) <= _LIMIT_BYTES else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise Damaged("is damaged (no JSON object)")
    if values.get("format_version") == 1 and _SEAL not in values:
        return values
    if values.pop(_SEAL, None) != _digest(values) or text != _text({**values, _SEAL: _digest(values)}):
        raise Damaged("is damaged (its own check differs)")
    return values


def _text(values: dict[str, Any]) -> bytes:
    return json.dumps(values, allow_nan=False, sort_keys=True).encode() + b"\n"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(_text(values)).hexdigest()
