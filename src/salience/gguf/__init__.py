"""GGUF files: header, metadata, vocabulary, and what they need of a model."""
