"""A model in a form that brings its own code: ``trust_remote_code`` loads it where no native class can hold it.

The code is that of ``pretrain/convert/remote`` and of the ``modeling.py`` of the mixers that the model has, each a
file in the exported directory: ``pretrain/models/NAME/modeling.py`` becomes ``mixer_NAME.py``. A model that reads
words also brings ``data/tokenizers/word_splitting.py``. Imports between them are rewritten to fit, and ``mixers.py`` is
written to name just those.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.config import HierarchicalBytesTokenizer, TokenizerConfig
from pretrain.config.model import ModelConfig
from pretrain.convert import remote
from pretrain.convert.native import PARTS, parts_of
from pretrain.errors import InputError
from pretrain.models.hugging_face import Piece
from pretrain.models.mixer_config import MixerConfig
from pretrain.models.modeling import all_float32_parameters
from pretrain.models.registry import MixerFamily, family_of

if TYPE_CHECKING:
    from pretrain.convert.remote.configuration_recurrent import RecurrentConfig

CONFIGURATION, MODELING, MIXERS = "configuration_recurrent", "modeling_recurrent", "mixers"
CACHE = "recurrent_cache"
ARCHITECTURE = "RecurrentForCausalLM"
PARTS_OF_STAGE = ("encoder", "decoder")
# The file of each hierarchy's class, and the class; it builds on that of models without one.
HIERARCHIES = {"hnet": ("modeling_hnet", "HNetForCausalLM"), "hat": ("modeling_hat", "HATForCausalLM")}
BLOCK_STACK, WORD_SPLITTING = "block_stack", "word_splitting"

_IMPORT = re.compile(r"^from pretrain\.models((?:\.\w+)*)\.modeling import ", re.MULTILINE)
_IMPORT_OF_WORDS = re.compile(rf"^from data\.tokenizers\.{WORD_SPLITTING} import ", re.MULTILINE)
# Within a process transformers takes the model class that it first loaded for a configuration class, and that class
# for the same if name of the directory and code of the configuration are.
_DIGEST = """
# Of all the code beside this, so that models with other code have another configuration class.
CODE_DIGEST = "{}"
"""
# What the copied files may import besides each other.
_LIBRARIES = {"__future__", "codecs", "collections", "dataclasses", "functools", "math", "re", "torch", "typing"}
_LIBRARIES |= {"transformers", "hat_splitter"}


def modeling_module(family: MixerFamily) -> str | None:
    """The module of a mixer's exported code; None where there is none."""
    name = f"{family.package}.modeling"
    try:
        return name if importlib.util.find_spec(name) and hasattr(family.hugging_face, "settings") else None
    except (ModuleNotFoundError, ValueError):
        # The package is no folder.
        return None


def file_stem(module: str) -> str:
    """The name that a ``modeling.py`` has in an exported directory."""
    parts = module.removeprefix("pretrain.models").removesuffix(".modeling").strip(".").split(".")
    if parts == [""]:
        return "layers"
    return "_".join(parts) if parts[0] == "channel" else "_".join(["mixer", *parts])


def problem(model: ModelConfig) -> str | None:
    """Why a model cannot be exported with code, in words; None where it can."""
    if model.hierarchy is not None and model.hierarchy.type not in HIERARCHIES:
        return f"there is no code to export a hierarchy of type {model.hierarchy.type} with"
    families = {family_of(config) for block in model.blocks.values() for _, config in parts_of(block)}
    missing = sorted(family.package for family in families if modeling_module(family) is None)
    if not missing:
        return None
    places = ", ".join(package.replace(".", "/") for package in missing)
    return f"exporting it with code of its own needs a modeling.py, and settings in hf.py, in {places}"


def _settings(config: MixerConfig, hidden_size: int) -> dict[str, Any]:
    family = family_of(config)
    return {"type": family.name, **family.hugging_face.settings(config, hidden_size)}


def _block_name(model: ModelConfig, name: str, hidden_size: int) -> str:
    """What a block is called in the exported configuration, at one of the widths at which it is used."""
    return name if hidden_size == model.hidden_size else f"{name}_{hidden_size}"


def _hierarchy(model: ModelConfig, tokenizer: TokenizerConfig | None) -> dict[str, Any]:
    """What the exported class needs to know of the stages, and of the words that it reads."""
    if model.hierarchy.type == "hat":
        return _hat(model, tokenizer)
    stages = []
    for stage in model.hierarchy.stages:
        size = stage.hidden_size
        parts = {part: [_block_name(model, name, size) for name in getattr(stage, part)] for part in PARTS_OF_STAGE}
        stages.append({"hidden_size": size, **parts})
    return {"type": model.hierarchy.type, "stages": stages}


def _hat(model: ModelConfig, tokenizer: TokenizerConfig | None) -> dict[str, Any]:
    if not isinstance(tokenizer, HierarchicalBytesTokenizer):
        raise InputError("a model of type hat is exported with its tokenizer, data.tokenizer.type=hierarchical_bytes")
    config = model.hierarchy
    names = {
        part: [_block_name(model, name, config.hidden_size) for name in getattr(config, part)]
        for part in PARTS_OF_STAGE
    }
    decoder = names["decoder"]
    return {
        "type": config.type,
        "hidden_size": config.hidden_size,
        "encoder": names["encoder"],
        "decoder": [decoder] if config.read_words == "first" else [[name] for name in decoder],
        "num_heads": config.num_heads,
        "maximum_word_bytes": tokenizer.maximum_word_bytes,
        "hat_splitter": importlib.metadata.version("hat-splitter"),
    }


@dataclass(frozen=True)
class CustomForm:
    """A model in the form of ``RecurrentForCausalLM``, whose tensors have our names.

    ``tokenizer`` is the run's, which models that read words need.
    """

    model: ModelConfig
    tokenizer: TokenizerConfig | None = None

    @property
    def architecture(self) -> str:
        return self._class_of_model[1]

    @property
    def _class_of_model(self) -> tuple[str, str]:
        """The file and the name of the class."""
        hierarchy = self.model.hierarchy
        return (MODELING, ARCHITECTURE) if hierarchy is None else HIERARCHIES[hierarchy.type]

    @property
    def needs_code(self) -> bool:
        return True

    @property
    def cached_generation(self) -> bool:
        return not self.model.reads_word_starts

    @property
    def masks_padding(self) -> bool:
        return True

    def loaded_dtype(self, dtype: str) -> str:
        """In what a model whose files are of ``dtype`` is loaded, unless its user says otherwise."""
        return dtype

    def write_config(self, directory: Path, dtype: str, marks: Mapping[str, Any]) -> None:
        """Writes ``config.json`` and the code.

        Args:
            directory: where they go.
            dtype: of the weights.
            marks: the special tokens' fields.
        """
        self._configuration(dtype, marks).save_pretrained(directory)
        for name, text in self.files().items():
            (directory / name).write_text(text)

    def _configuration(self, dtype: str, marks: Mapping[str, Any]) -> RecurrentConfig:
        from pretrain.convert.remote.configuration_recurrent import RecurrentConfig

        model = self.model
        layers = [model.layers[layer % len(model.layers)] for layer in range(model.num_layers)]
        # The settings of a block depend on its width, and stages may use one block at several.
        blocks = {
            _block_name(model, name, size): {
                part: _settings(config, size) for part, config in parts_of(model.blocks[name])
            }
            for name, size in sorted({(used.name, used.hidden_size) for used in model.used_blocks()})
        }
        further = {}
        if model.hierarchy is not None:
            further = {"embedding_size": model.embedding_size, "hierarchy": _hierarchy(model, self.tokenizer)}
        module, name = self._class_of_model
        auto_map = {"AutoConfig": f"{CONFIGURATION}.RecurrentConfig", "AutoModelForCausalLM": f"{module}.{name}"}
        return RecurrentConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            layers=layers,
            blocks=blocks,
            norm=model.norm,
            norm_epsilon=model.norm_epsilon,
            output_logit_soft_cap=model.output_logit_soft_cap,
            tie_word_embeddings=model.tie_embeddings,
            architectures=[name],
            auto_map=auto_map,
            dtype=dtype,
            use_cache=self.cached_generation,
            **further,
            **marks,
        )

    def files(self) -> dict[str, str]:
        """The code, by file name."""
        families = {part: {} for part in PARTS}
        for block in self.model.blocks.values():
            for part, config in parts_of(block):
                family = family_of(config)
                families[part][family.name] = modeling_module(family)
        stack = () if self.model.hierarchy is None else (BLOCK_STACK,)
        names = dict.fromkeys((CONFIGURATION, CACHE, MODELING, *stack, self._class_of_model[0]))
        code = {f"{name}.py": self_contained(_source(f"{remote.__name__}.{name}")) for name in names}
        if self.model.reads_word_starts:
            code[f"{WORD_SPLITTING}.py"] = self_contained(_source(f"data.tokenizers.{WORD_SPLITTING}"))
        code[f"{MIXERS}.py"] = _mixers_file(families["mixer"], families["channel"])
        used = {module for modules in families.values() for module in modules.values()}
        for module in _with_imports({*used, "pretrain.models.modeling"}):
            code[f"{file_stem(module)}.py"] = self_contained(_source(module))
        code[f"{CONFIGURATION}.py"] += _DIGEST.format(_digest(code))
        return code

    def pieces(self, parameters: Iterable[str]) -> dict[str, dict[str, Piece]]:
        """What the weight files hold: tensor -> our parameters that it is made of."""
        return {name: {name: Piece(name)} for name in parameters}

    def float32_parameters(self) -> set[str]:
        """Parameters that stay float32 in files and model whatever the dtype of the others, as the mixers declare."""
        module, name = self._class_of_model
        model_class = getattr(importlib.import_module(f"{remote.__name__}.{module}"), name)
        with torch.device("meta"):
            model = model_class(self._configuration("float32", {}))
        return set(all_float32_parameters(model))


def _digest(code: Mapping[str, str]) -> str:
    return hashlib.sha256("\0".join(text for pair in sorted(code.items()) for text in pair).encode()).hexdigest()


@functools.cache
def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(f"{module} is not installed as a file, so its code cannot be exported")
    return Path(spec.origin).read_text(encoding="utf-8")


def _with_imports(modules: Iterable[str]) -> list[str]:
    """The modules, and the modeling files that they import, directly or not."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [f"pretrain.models{path}.modeling" for path in _IMPORT.findall(_source(module))]
    return sorted(found)


def self_contained(source: str) -> str:
    """A file's code with its imports of other modeling files rewritten to files beside it.

    Raises:
        InputError: it imports something that an exported directory does not have.
    """
    rewritten = _IMPORT.sub(lambda match: f"from .{file_stem(f'pretrain.models{match[1]}.modeling')} import ", source)
    rewritten = _IMPORT_OF_WORDS.sub(f"from .{WORD_SPLITTING} import ", rewritten)
    for node in ast.walk(ast.parse(rewritten)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] not in _LIBRARIES:
                raise InputError(f"code for an exported model imports {name}, which is not shipped with it")
    return rewritten


def _mixers_file(mixers: Mapping[str, str], channels: Mapping[str, str]) -> str:
    """``mixers.py``: the classes of this model's mixers by the type that its configuration gives."""
    lines = ['"""The mixers that this model has, by their type."""', ""]
    for modules in (mixers, channels):
        for _, module in sorted(modules.items()):
            stem = file_stem(module)
            lines.append(f"from .{stem} import MODELING as {stem}")
    for variable, modules in (("MIXERS", mixers), ("CHANNELS", channels)):
        entries = ", ".join(f'"{name}": {file_stem(module)}' for name, module in sorted(modules.items()))
        lines += ["", f"{variable} = {{{entries}}}"]
    return "\n".join(lines) + "\n"
