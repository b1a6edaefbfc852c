"""Files of weights, read without running anything that is in them.

safetensors, what `torch.save` wrote of tensors and plain containers, and TorchScript archives such as
OpenAI's CLIP files in; the same content, or a flat state of named tensors, out. There is no other way of
reading them to fall back to.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UnreadableImage
from ..limits import VARIABLE, limits
from ..plain_files import BoundedFile
from .torchscript import is_torchscript, read_torchscript

_DEEPEST = 32  # dictionaries in each other
# What OpenAI's archives hold beside weights, and a mask that is made anew from the length of the text.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def read_weights(path: Path) -> dict[str, Any]:
    """Whatever a file of weights holds: names to tensors, to plain values, or to further such dictionaries.

    Raises:
        UnreadableImage: the file is missing or damaged, needs code to be read, or holds no names.
    """
    if not path.is_file():
        raise UnreadableImage(f"{path.name} does not exist, or is a folder; choose a file of weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if is_torchscript(path):
        return dict(read_torchscript(path))
    try:
        content = _loaded(path)
    except UnreadableImage:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UnreadableImage(
            f"{path.name} is not a file of weights that can be read safely: {_reason(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise UnreadableImage(f"{path.name} holds a {type(content).__name__}, not weights with names")
    return dict(content)


def flattened(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of nested dictionaries under names joined by dots, and the names of all that is no tensor."""
    tensors, others = {}, []
    for name, value in _leaves(content):
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            others.append(name)
    return tensors, others


def read_clip_state(path: Path) -> dict[str, Tensor]:
    """State of a CLIP under open_clip's names, which are OpenAI's too, in float32.

    Raises:
        UnreadableImage: see `read_weights`.
    """
    content = read_weights(path)
    state, _ = flattened(content.get("state_dict", content))
    if state and all(name.startswith("module.") for name in state):  # written by parallel training
        state = {name[len("module.") :]: value for name, value in state.items()}
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if name not in _NOT_WEIGHTS
    }


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise UnreadableImage(f"{path.name} cannot be read: {error}") from error


def _loaded(path: Path) -> Any:
    """What torch makes of a file of its own, without running anything that is in it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        # torch never compresses, but unpacks what others did.
        claimed = sum(entry.file_size for entry in entries)
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or claimed > path.stat().st_size:
            raise UnreadableImage(
                f"{path.name} is compressed, which files of weights are not; nothing was unpacked"
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    with BoundedFile(path) as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """Names, joined by dots, and values of nested dictionaries, in their order.

    Raises:
        UnreadableImage: they are deeper, or hold more, than weights do; one may hold itself.
    """
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    seen = 0
    while waiting:
        name, value, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > limits().weights_names:
            raise UnreadableImage(
                f"The file holds dictionaries in each other more than {_DEEPEST} deep, or more than "
                f"{limits().weights_names:,} values, which weights do not; {VARIABLE} moves the second limit"
            )
        if isinstance(value, Mapping):
            parts = [(f"{name}.{key}" if name else str(key), part, depth + 1) for key, part in value.items()]
            waiting.extend(reversed(parts))
        else:
            yield name, value


def _reason(error: Exception) -> str:
    """torch's message without its advice on reading the file all the same."""
    text = str(error)
    wanted = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", text)
    if wanted:
        return (
            f"it asks for {wanted[1]}, which weights do not need; nothing of it was run. "
            "Ask for a file that holds tensors only"
        )
    return re.sub(r"\s+", " ", text).split("Please file")[0].strip()[:200] or type(error).__name__
