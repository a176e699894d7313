"""One block after the other: its inputs, statistics and structure, its solution, its record."""
