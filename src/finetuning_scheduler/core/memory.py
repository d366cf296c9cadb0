"""How much memory is free, as far as the machine tells."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_UNKNOWN = 1 << 32  # bytes that are taken to be free where nothing is known
_CGROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Return how many bytes a process may still use of the machine's, or of its container's, main memory."""
    free = [each for each in (_of_the_machine(), _of_the_container()) if each is not None]
    return min(free, default=_UNKNOWN)


def _of_the_machine() -> int | None:
    available = _numbers(Path("/proc/meminfo")).get("MemAvailable:")
    if available is not None:
        return available * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # there are systems that tell nothing
        return None


def _of_the_container() -> int | None:
    """Tell what a limit of a control group leaves; pages of files that the kernel can drop do not count as used."""
    for folder, limit, usage, files in (
        (_CGROUPS, "memory.max", "memory.current", "inactive_file"),
        (_CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, used = _number(folder / limit), _number(folder / usage)
        if most is not None and used is not None:
            return max(0, most - used + _numbers(folder / "memory.stat").get(files, 0))
    return None


def _numbers(path: Path) -> Mapping[str, int]:
    """Read lines of a word and a number."""
    try:
        lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeDecodeError):
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit
