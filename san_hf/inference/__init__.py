"""From images and class names to label maps: the one path that everything here uses."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
