"""Checkpoints into Hugging Face's form, and from it."""

from pretrain.convert.huggingface import ExportReport, export_model
from pretrain.convert.importing import ImportReport, import_model

__all__ = ["ExportReport", "ImportReport", "export_model", "import_model"]
