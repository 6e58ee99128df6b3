from .load import ModelError, from_pretrained, load_model, resolve
from .push import push_to_hub, save_pretrained

__all__ = ["ModelError", "from_pretrained", "load_model", "push_to_hub", "resolve", "save_pretrained"]
