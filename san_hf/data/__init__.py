"""Data to train and measure on: benchmarks, data sets of the Hub, and one's own."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
