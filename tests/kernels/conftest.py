"""Runs Triton kernels in the interpreter where there is no GPU.

Triton reads the variable when it is first imported; torch alone does not import it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def language_replaced_once() -> Iterator[None]:
    """The interpreter replaces Triton's language once a launch, not again at each call of a device function.

    Looking for what to replace would be half of the time of these tests, and finds nothing within a launch.
    """
    from triton import language
    from triton.runtime import interpreter

    replace_language: Callable[[Any], Any] = interpreter._patch_lang

    def replace_unless_replaced(function: Any) -> Any:
        found = [value for value in function.__globals__.values() if value is language or value is language.core]
        if found and not any(language.core.is_builtin(module.load) for module in found):
            return interpreter._LangPatchScope()
        return replace_language(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_unless_replaced)
        yield
