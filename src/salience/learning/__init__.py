"""Codes, scales and norms learned by gradient: a block at a time, then the whole model."""
