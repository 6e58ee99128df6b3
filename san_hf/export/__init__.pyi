from .errors import ExportError
from .exporting import export_model
from .runtime import ExportedVision, load_exported

__all__ = ["ExportError", "ExportedVision", "export_model", "load_exported"]
