"""What several tests use: the reference loop, what it and every driver train, and processes that are ranks."""
