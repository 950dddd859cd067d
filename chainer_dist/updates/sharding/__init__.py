"""How parameters are shared out to ranks, and which can be."""
