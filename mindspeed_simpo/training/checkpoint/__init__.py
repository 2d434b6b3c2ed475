"""Training checkpoints: each rank writes its own shard, and a checkpoint exists when all shards are complete.

A checkpoint is a folder ``iter_0000100`` with one safetensors file per rank (pieces of Hugging Face tensors with their
Adam state, and the random state of the rank), ``state.json`` (step, data position, resolved configuration) and, written
last, ``files.json`` (size and digest of every other file). The folder is written under a temporary name and renamed
when it is complete, so that a killed run leaves no incomplete folder under the name of a checkpoint. No file holds
code: every file is safetensors or JSON.
"""

from mindspeed_simpo.training.checkpoint.folder import (
    TrainingState,
    choose,
    find,
    find_newest,
    folder_of,
    list_checkpoints,
    name_best,
    read_state,
)
from mindspeed_simpo.training.checkpoint.reader import load
from mindspeed_simpo.training.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointWriter",
    "TrainingState",
    "choose",
    "find",
    "find_newest",
    "folder_of",
    "list_checkpoints",
    "load",
    "name_best",
    "read_state",
]
