"""Runnable examples: digits, text classification, SuperGLUE, the LP-FT study, model parallel; a memory profiler."""
