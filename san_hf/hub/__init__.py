"""Models by name: the released checkpoints, converted once and kept; and your own models on the Hub."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
