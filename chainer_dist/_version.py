"""The version of the package, in the only place that states it (``setup.py`` reads it as text)."""

__version__ = "0.1.0"
