"""From a model to its checkpoint: blocks, statistics, search, codes, journal, files."""
