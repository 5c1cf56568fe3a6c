"""The version of innermax."""

__version__ = "0.1.0"
