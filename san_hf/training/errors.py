"""Errors of a training."""


class TrainingError(RuntimeError):
    """A training that can't start or go on; the message says why, and what is left."""


class PeerError(TrainingError):
    """Another process has failed, and says why."""


class CheckpointError(OSError):
    """A checkpoint that could not be written or read; the message says why, and what is left."""
