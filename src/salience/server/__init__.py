"""Answer requests over HTTP: by our own engine, or by another one on the same checkpoint."""
