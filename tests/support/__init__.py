"""What is supported, as data."""
