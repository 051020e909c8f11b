"""YAML files, dotted overrides, and errors in words. Imports no torch."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import DataConfig
from pretrain.config.schema import Config
from pretrain.config.yaml_text import read_yaml
from pretrain.errors import InputError


class _DataSection(pydantic.BaseModel):
    """The part of a run's configuration that says what it reads; the other sections are not looked into."""

    data: DataConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file with all that it builds on, applies ``key=value`` overrides, and validates.

    ``base:`` lists files, relative to the one that names them, which are merged in order beneath it.

    Raises:
        InputError: naming the file and the key that is wrong, and what was expected.
    """
    return parse_config(read_merged(Path(path), overrides), str(path))


def read_merged(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What :func:`load_config` validates: a file, all that it builds on, and overrides.

    Raises:
        InputError: naming the file, and what of it cannot be read or is still to be chosen.
    """
    merged = _apply_overrides(_read_with_bases(path, ()), overrides)
    return _plain(merged, str(path))


def load_data_config(path: Path, overrides: Sequence[str]) -> DataConfig:
    """The ``data`` section of a YAML file that may hold nothing else, or a whole run.

    Files beneath it (``base``) and ``key=value`` overrides count as in :func:`load_config`; overrides name keys from
    the top, as in ``data.held_out_fraction=0.1``. Other sections may be there and are not validated.

    Raises:
        InputError: naming the file and the key that is wrong, and what was expected.
    """
    raw = read_merged(Path(path), overrides)
    unknown = [key for key in raw if key not in Config.model_fields]
    if unknown:
        raise InputError(f"{path}: {_describe({'loc': unknown[:1], 'type': 'extra_forbidden'}, raw)}")
    try:
        return _DataSection.model_validate(raw).data
    except pydantic.ValidationError as error:
        problems = [_describe(problem, raw) for problem in error.errors()]
        raise InputError(f"{path}: " + "; ".join(dict.fromkeys(problems))) from None


def parse_config(raw: dict[str, Any], origin: str) -> Config:
    """Validates a plain mapping; ``origin`` names it in messages.

    Raises:
        InputError: with one sentence for each key that is wrong.
    """
    try:
        return Config.model_validate(raw)
    except pydantic.ValidationError as error:
        problems = [_describe(problem, raw) for problem in error.errors()]
        raise InputError(f"{origin}: " + "; ".join(dict.fromkeys(problems))) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> Any:
    try:
        resolved = path.resolve()
        if resolved in above:
            raise InputError(f"{path}: its 'base' files lead back to itself; take one of them out")
        text = path.read_text()
    except FileNotFoundError:
        named = f" (named under 'base' in {above[-1]})" if above else ""
        raise InputError(f"{path}: no such configuration file{named}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a text file ({error})") from None
    try:
        raw = read_yaml(text)
    except ValueError as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: must hold a mapping of keys to values, but holds {type(raw).__name__}")
    bases = raw.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"{path}: 'base' must be a file name or a list of file names")
    parts = [_read_with_bases(path.parent / base, (*above, resolved)) for base in bases]
    try:
        return OmegaConf.merge(*parts, OmegaConf.create(_exponents_as_numbers(raw)))
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: cannot be merged with its base files: {error}") from None


def _exponents_as_numbers(value: Any) -> Any:
    """YAML 1.1 reads 3e-4 as text; people mean a number."""
    if isinstance(value, dict):
        return {key: _exponents_as_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exponents_as_numbers(item) for item in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _apply_overrides(merged: Any, overrides: Sequence[str]) -> Any:
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key.strip(".[]"):
            raise InputError(f"override '{override}': expected key=value, for instance train.steps=100")
        try:
            parsed = _exponents_as_numbers(read_yaml(value))
            OmegaConf.update(merged, key, parsed, merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError, LookupError) as error:
            raise InputError(f"override '{override}': cannot be applied ({' '.join(str(error).split())})") from None
    return merged


def _plain(merged: Any, origin: str) -> dict[str, Any]:
    try:
        unchosen = sorted(OmegaConf.missing_keys(merged))
        plain = typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise InputError(f"{origin}: {' '.join(str(error).split())}") from None
    if unchosen:
        raise InputError(
            f"{origin}: {', '.join(unchosen)} must still be chosen: replace ??? in the file, or give "
            f"{unchosen[0]}=VALUE on the command line"
        )
    return plain


def _describe(problem: Any, raw: dict[str, Any]) -> str:
    """One of pydantic's findings as a sentence that starts with the dotted key."""
    keys = _keys_in(problem["loc"], raw)
    name = ".".join(map(str, keys))
    kind = problem["type"]
    if kind == "extra_forbidden":
        known = _known_keys(Config, keys[:-1], raw)
        close = difflib.get_close_matches(str(keys[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key '{name}'; {hint}"
    if kind == "missing":
        return f"'{name}' is missing; it must be given"
    if kind.startswith("union_tag"):
        expected = problem["ctx"].get("expected_tags", "the name of a registered kind")
        return f"'{name}.type' must be one of {expected}, but is {problem['ctx'].get('tag', 'missing')!r}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"'{name}': {message}" if name else message
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"'{name}' is {shown}: {message[0].lower()}{message[1:]}"


def _keys_in(location: Sequence[Any], raw: Any) -> list[Any]:
    """Pydantic's location without the tags of unions, which the file does not hold."""
    keys = []
    for position, key in enumerate(location):
        last = position == len(location) - 1
        if isinstance(raw, dict) and key in raw:
            raw = raw[key]
        elif isinstance(raw, list) and isinstance(key, int) and key < len(raw):
            raw = raw[key]
        elif not (last and isinstance(raw, dict)):
            continue
        keys.append(key)
    return keys


def _known_keys(model: Any, keys: Sequence[Any], raw: Any) -> list[str]:
    """Keys that a section may have; where several kinds may stand there, those of the kind that its ``type`` names."""
    annotations = [model]
    for key in keys:
        annotations = [inner for outer in annotations for kind in _kinds(outer) for inner in _below(kind, key)]
        raw = raw[key]
    kinds = [kind for annotation in annotations for kind in _kinds(annotation)]
    named = raw.get("type") if isinstance(raw, dict) else None
    chosen = [kind for kind in kinds if named in _types_of(kind)] or kinds
    return sorted({name for kind in chosen for name in getattr(kind, "model_fields", ())})


def _types_of(kind: Any) -> tuple[Any, ...]:
    """What ``type`` may be in a section of this kind."""
    field = getattr(kind, "model_fields", {}).get("type")
    return typing.get_args(field.annotation) if field else ()


def _kinds(annotation: Any) -> list[Any]:
    """The sections, mappings and lists among what an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (dict, list):
        return [annotation]
    return [kind for argument in typing.get_args(annotation) for kind in _kinds(argument)]


def _below(kind: Any, key: Any) -> list[Any]:
    """The annotation of what stands under ``key`` in a section, a mapping or a list."""
    if typing.get_origin(kind) in (dict, list):
        return [typing.get_args(kind)[-1]]
    field = kind.model_fields.get(key)
    return [field.annotation] if field else []
