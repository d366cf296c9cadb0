"""Why a prefix is not reused."""

from __future__ import annotations


class Refused(Exception):  # noqa: N818 - no error of the user's: the run goes on without reuse
    """Reuse is not possible here; the text says why. It never leaves the package."""


class Misused(Refused):
    """The way in which steps are given leaves nothing to reuse, whatever is trained; the text says what to do."""
