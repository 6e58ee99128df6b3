from .load import from_pretrained, resolve
from .push import push_to_hub, save_pretrained

__all__ = ["from_pretrained", "push_to_hub", "resolve", "save_pretrained"]
