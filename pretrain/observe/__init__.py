"""What a person sees of a run: its directory, its metrics, its progress, its report.

This module imports nothing, so that ``pretrain.doctor`` can use ``environment`` where packages are missing.
"""
