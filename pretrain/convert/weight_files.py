"""The weight files of a Hugging Face directory: safetensors alone, whole or in shards, read piece by piece."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.errors import InputError

WHOLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# What is read as float32 without a loss, by the names that the format gives dtypes.
READABLE_DTYPES = ("F32", "BF16", "F16")


def confined_file(directory: Path, name: str) -> Path:
    """The path of a file that lies in ``directory`` itself.

    A link may lead only to where the hub's cache keeps the files of its snapshots, ``blobs`` beside ``snapshots``.

    Raises:
        InputError: the name leads elsewhere, or there is no such regular file.
    """
    path = directory / name
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InputError(f"{directory}: the file name {name!r} is refused, because it leads out of the directory")
    if not is_text(name):
        raise InputError(f"{directory}: the file name {name!r} is refused, because it holds half a character")
    try:
        resolved, status = path.resolve(strict=True), path.stat()
    except (OSError, RuntimeError):
        raise InputError(f"{path} is missing; download or save the model again") from None
    allowed = [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":
        allowed.append(directory.resolve().parent.parent / "blobs")
    if resolved.parent not in allowed:
        raise InputError(f"{path} is a link to {resolved}, outside of the directory; copy the file itself into place")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is not a regular file")
    return path


def is_text(name: str) -> bool:
    """False for a name with half of a UTF-16 pair, which JSON can hold, but no file name, and no log of an error."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def read_json_object(directory: Path, name: str) -> dict[str, Any]:
    """A JSON file of the directory that holds an object.

    Raises:
        InputError: it is missing, lies elsewhere, or holds something else.
    """
    path = confined_file(directory, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); download or save the model again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of a tensor.

    Attributes:
        file: its name.
        dtype: as the format writes it, for instance ``BF16``.
        shape: of the whole tensor.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


class WeightFiles:
    """The weights of a Hugging Face directory; opening it reads no tensor, only headers.

    The library that reads a header refuses one that does not fit the file's size, so that no tensor is larger than its
    file.

    Attributes:
        tensors: what the headers hold, by name.
        problems: where files and index contradict each other, one sentence each.

    Raises:
        InputError: there are no safetensors files, or one of them cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        self.problems: list[str] = []
        self._opened: tuple[str, Any] | None = None
        places = self._places()
        for file in [WHOLE_FILE] if places is None else sorted(set(places.values())):
            for name, tensor in self._header(file).items():
                if places is not None and places.get(name) != file:
                    self.problems.append(f"{file} holds {name}, but {INDEX_FILE} does not say so")
                self.tensors.setdefault(name, tensor)
        for name, file in (places or {}).items():
            if name not in self.tensors:
                self.problems.append(f"{INDEX_FILE} says that {file} holds {name}, but it does not")

    @property
    def elements(self) -> int:
        """Of all tensors together."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())

    def read(self, name: str, offset: int = 0, length: int | None = None) -> Tensor:
        """Rows ``offset`` to ``offset + length`` of a tensor along its first dimension (None: all), as float32.

        Raises:
            InputError: the file cannot be read.
        """
        file = self.tensors[name].file
        try:
            handle = self._open(file)
            if length is None:
                return handle.get_tensor(name).to(torch.float32)
            return handle.get_slice(name)[offset : offset + length].to(torch.float32)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.directory / file}: {name} cannot be read: {error}") from None

    def close(self) -> None:
        """Lets the last opened file go."""
        self._opened = None

    def _places(self) -> dict[str, str] | None:
        """Tensor -> file, as the index says; None where there is one file alone."""
        whole, index = (self.directory / name for name in (WHOLE_FILE, INDEX_FILE))
        if whole.exists() and index.exists():
            raise InputError(
                f"{self.directory} holds both {WHOLE_FILE} and {INDEX_FILE}, so its weights are there twice; take away "
                f"what is not meant"
            )
        if whole.exists():
            return None
        if not index.exists():
            raise InputError(self._nothing_to_read())
        places = read_json_object(self.directory, INDEX_FILE).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise InputError(f"{index}: 'weight_map' must name the file of each tensor")
        for name in places:
            if not is_text(name):
                raise InputError(f"{index}: the tensor name {name!r} in 'weight_map' holds half a character")
        return places

    def _nothing_to_read(self) -> str:
        pickled = [name for name in _PICKLED if (self.directory / name).exists()]
        if not pickled:
            return f"{self.directory} holds neither {WHOLE_FILE} nor {INDEX_FILE}, so there are no weights to import"
        return (
            f"{self.directory} holds its weights as {pickled[0]}, a pickle, which may run code when it is read and is "
            f"refused; where you trust it, load it with transformers and write it anew with save_pretrained, which "
            f"writes {WHOLE_FILE}"
        )

    def _header(self, file: str) -> dict[str, StoredTensor]:
        try:
            handle = self._open(file)
            stored = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(file, part.get_dtype(), tuple(part.get_shape())) for name, part in stored.items()
            }
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{self.directory / file} is no sound safetensors file ({error}); download or save it again"
            ) from None

    def _open(self, file: str) -> Any:
        # One at a time: what was read of a file counts as this process's memory while it is open.
        if self._opened is None or self._opened[0] != file:
            self._opened = None
            self._opened = file, safe_open(confined_file(self.directory, file), framework="pt", device="cpu")
        return self._opened[1]
