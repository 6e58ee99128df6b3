from .convert import convert_checkpoint, convert_state_dict, export_checkpoint, export_state_dict
from .errors import ConversionError
from .original import read_original
from .releases import HUB_REPO, RELEASES, Release
from .tokenizer import clip_tokenizer

__all__ = [
    "HUB_REPO",
    "RELEASES",
    "ConversionError",
    "Release",
    "clip_tokenizer",
    "convert_checkpoint",
    "convert_state_dict",
    "export_checkpoint",
    "export_state_dict",
    "read_original",
]
