"""Tests; `tests.reference` holds what several of them use."""
