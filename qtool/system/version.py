"""The version of qtool."""

__version__ = "0.1.0"
