"""The version of this package, which job keys, artifacts and reports carry."""

__version__ = "0.1.0"
