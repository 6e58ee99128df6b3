"""Errors of conversions."""


class ConversionError(ValueError):
    """A checkpoint that can't be converted; the message names the file or the keys, and what to do."""
