"""Files of a trainer's state: written whole or not at all, checked, and loaded without pickle."""
