"""What a machine can do, and what is wrong with a checkpoint: found by trying, not by asking."""
