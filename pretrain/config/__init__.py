"""Configuration: the schema, and how a YAML file and dotted overrides become one. Imports no torch."""

from pretrain.config.loading import dump_config, load_config, load_data_config, parse_config, read_merged
from pretrain.config.model import ModelConfig
from pretrain.config.schema import Config
from pretrain.config.sections import ParallelConfig, TrainConfig

__all__ = [
    "Config",
    "ModelConfig",
    "ParallelConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
    "load_data_config",
    "parse_config",
    "read_merged",
]
