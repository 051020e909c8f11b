"""Runs Triton kernels in the interpreter where there is no GPU.

Triton reads the variable when it is first imported; torch alone does not import it.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
