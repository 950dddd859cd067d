"""Ways to change parameters by averaged gradients."""
