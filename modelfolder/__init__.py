"""A model on disk: a folder with config.json and model.safetensors, alone or as one part of a bundle."""

from modelfolder.folder import (
    ModelFolder,
    ModelFolderError,
    add_file,
    check_replaceable,
    content_hash,
    file_hash,
    locate,
    read_weights,
    replacing_folder,
    stored_kind,
    upload,
    write_folder,
)

__all__ = [
    "ModelFolder",
    "ModelFolderError",
    "add_file",
    "check_replaceable",
    "content_hash",
    "file_hash",
    "locate",
    "read_weights",
    "replacing_folder",
    "stored_kind",
    "upload",
    "write_folder",
]
