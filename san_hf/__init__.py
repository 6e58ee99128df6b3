"""SAN, the Side Adapter Network (Xu et al., CVPR 2023, arXiv 2302.12242), as a Transformers model."""

__version__ = "0.1.0"
