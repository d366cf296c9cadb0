"""The engine: a schedule is data, and these are functions on it. Needs PyTorch, not Lightning."""
