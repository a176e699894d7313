"""Measuring what quantization cost."""
