"""The distribution of parameters and optimizer state over ranks, and the conditions for it."""
