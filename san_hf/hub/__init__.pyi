from .load import ModelError, from_pretrained, load_model, resolve
from .push import PushError, push_folder, push_to_hub, save_pretrained

__all__ = [
    "ModelError",
    "PushError",
    "from_pretrained",
    "load_model",
    "push_folder",
    "push_to_hub",
    "resolve",
    "save_pretrained",
]
