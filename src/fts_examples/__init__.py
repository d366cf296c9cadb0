"""Runnable examples: ``python -m fts_examples.digits``, ``python -m fts_examples.text_classification``."""
