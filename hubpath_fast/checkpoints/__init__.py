"""Checkpoints on disk: folders that are whole or absent, and in them one file for each expert.

It knows ``nn.Module`` and no model of this package: whatever has an ``nn.ModuleList`` called
``experts`` is stored by expert, all else as one file.
"""

from .errors import CheckpointError
from .folders import (
    discard_unfinished,
    find_checkpoint,
    replacing_folder,
    saying_unsaved,
)
from .layout import (
    CONFIG_FILE,
    FORMAT,
    INDEX_FILE,
    ROUTER_FILE,
    SINGLE_FILE,
    STATE_FILE,
    Part,
    parts_of,
)
from .load import assign_weights, load_weights
from .read import SavedModel, load_config, read_file
from .tensor_file import TensorFile
from .write import Written, record, remember, write_about, write_model, write_parts

__all__ = [
    "CONFIG_FILE",
    "FORMAT",
    "INDEX_FILE",
    "ROUTER_FILE",
    "SINGLE_FILE",
    "STATE_FILE",
    "CheckpointError",
    "Part",
    "SavedModel",
    "TensorFile",
    "Written",
    "assign_weights",
    "discard_unfinished",
    "find_checkpoint",
    "load_config",
    "load_weights",
    "parts_of",
    "read_file",
    "record",
    "remember",
    "replacing_folder",
    "saying_unsaved",
    "write_about",
    "write_model",
    "write_parts",
]
