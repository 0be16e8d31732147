"""The version of bmjax."""

__version__ = "0.1.0"
