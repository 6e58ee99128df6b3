"""Errors about data."""


class DataError(ValueError):
    """Data that can't be used; the message names the file, the index or the key, and says what to do."""
