"""SAN, the Side Adapter Network (Xu et al., CVPR 2023, arXiv 2302.12242), as a Transformers model.

Importing this makes Transformers' Auto classes take this code for every SAN checkpoint, see
[`san_hf.registration`]. The names themselves are imported when they are used; `__init__.pyi` lists them.
"""

import lazy_loader

from san_hf.registration import register_when_imported


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
register_when_imported()
