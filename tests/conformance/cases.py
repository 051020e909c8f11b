"""The cases of the conformance suite: every example of every registered mixer, and of the README's mixer.

Worker processes import this module too and find a case by its name.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pretrain.models
from pretrain.models.mixer_config import MixerConfig
from pretrain.models.registry import MixerFamily, channel_mixers, sequence_mixers
from tests.conformance.mistakes import MISTAKES

README = Path(pretrain.models.__file__).with_name("README.md")
README_PACKAGE = "pretrain.models.leaky_integrator"

# Odd examples take the second width, so that no test passes by a coincidence of sizes.
HIDDEN_SIZES = (32, 48)


@dataclass(frozen=True)
class Case:
    """One configuration of one mixer.

    Attributes:
        name: ``family-index``, by which worker processes find it.
        family: as registered.
        config: one of its examples.
        hidden_size: width of the residual stream.
    """

    name: str
    family: MixerFamily = field(repr=False)
    config: MixerConfig
    hidden_size: int

    def __str__(self) -> str:
        return self.name


def examples(family: MixerFamily, name: str) -> list[Case]:
    """A case for each example, or for more widths where there are few examples."""
    count = max(len(family.config.examples(HIDDEN_SIZES[0])), len(HIDDEN_SIZES))
    cases = []
    for index in range(count):
        hidden_size = HIDDEN_SIZES[index % len(HIDDEN_SIZES)]
        configs = family.config.examples(hidden_size)
        cases.append(Case(f"{name}-{index}", family, configs[index % len(configs)], hidden_size))
    return cases


def readme_files() -> dict[str, str]:
    """The README's code, by file name: a block's first line is a comment that begins with the name."""
    blocks = re.findall(r"```python\n(# (\w+)\.py:.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return {name: code for code, name in blocks}


def readme_family(name: str, replacements: Mapping[str, str]) -> MixerFamily:
    """The README's mixer as a family under a package of its own, as if it were a folder.

    Args:
        name: part of the package's name.
        replacements: old code -> new code, for mixers that are broken on purpose.

    Raises:
        ValueError: an old piece of code is not in the README.
    """
    package = f"{README_PACKAGE}_{name}"
    files = readme_files()
    for old in replacements:
        if sum(code.count(old) for code in files.values()) != 1:
            raise ValueError(f"the README's mixer holds {old!r} not exactly once")
    sys.modules[package] = ModuleType(package)
    for file in ("config", "cost", "mixer", "hf"):
        code = files[file].replace(README_PACKAGE, package)
        for old, new in replacements.items():
            code = code.replace(old, new)
        module = sys.modules[f"{package}.{file}"] = ModuleType(f"{package}.{file}")
        exec(compile(code, f"{README.name}:{file}.py", "exec"), module.__dict__)  # noqa: S102
    return MixerFamily("leaky_integrator", "sequence", package)


@functools.cache
def sequence_cases() -> tuple[Case, ...]:
    """Of every registered sequence mixer, then of the README's."""
    registered = [case for name, family in sequence_mixers().items() for case in examples(family, name)]
    return (*registered, *examples(readme_family("example", {}), "readme"))


@functools.cache
def channel_cases() -> tuple[Case, ...]:
    """Of every registered channel mixer."""
    return tuple(case for name, family in channel_mixers().items() for case in examples(family, f"channel-{name}"))


@functools.cache
def broken_case(mistake: str) -> Case:
    """The README's mixer with one mistake, at the first width."""
    return examples(readme_family(mistake, MISTAKES[mistake].replacements), f"broken-{mistake}")[0]


def find_case(name: str) -> Case:
    """The case of a name.

    Raises:
        KeyError: there is none.
    """
    if name.startswith("broken-"):
        return broken_case(name.removeprefix("broken-").rsplit("-", 1)[0])
    return {case.name: case for case in (*sequence_cases(), *channel_cases())}[name]
