"""Checkpoints into Hugging Face's form."""

from pretrain.convert.huggingface import ExportReport, export_model

__all__ = ["ExportReport", "export_model"]
