"""The version of this package: the one place that says it. The build reads it from here."""

__version__ = "0.1.0"
