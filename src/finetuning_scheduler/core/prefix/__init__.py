"""Frozen-prefix reuse: what runs before the first trainable parameter is computed once a sample and replayed after."""
