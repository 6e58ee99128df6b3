"""What can go wrong with an export."""


class ExportError(ValueError):
    """A model that can't be exported, or an export that can't be used; the message says why, and what to do."""
