"""How values, lists and suggestions are said in messages."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel, _short.maxdict, _short.maxlist = 2, 3, 3


def shown(value: Any) -> str:
    """A value for a message: short, and None and booleans as YAML writes them."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "not-a-number" if math.isnan(value) else "infinity"
    if isinstance(value, tuple):
        return _short.repr(list(value))
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 75 digits"
    return _short.repr(value)


def listed(items: Sequence[str], limit: int = 10) -> str:
    """Join the first items and count the others."""
    first = ", ".join(items[:limit])
    return first if len(items) <= limit else f"{first} and {len(items) - limit:,} more"


def did_you_mean(near: Sequence[str], otherwise: str) -> str:
    """Ask about words close to one that is unknown; without any, say something else."""
    return f"Did you mean {' or '.join(f'`{word}`' for word in near)}?" if near else otherwise


def closest(word: object, known: Iterable[str], count: int = 1) -> list[str]:
    """Find the known words that look most like one that is not known, the closest first."""
    return difflib.get_close_matches(str(word), list(known), n=count)
