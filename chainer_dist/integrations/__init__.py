"""What other libraries need to work on many ranks, each in a module that is imported by its name."""
