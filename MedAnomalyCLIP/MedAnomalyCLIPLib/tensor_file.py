"""Tensors written to a file that is whole when it appears; a full disk or a kill leaves the one before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .output_folder import writing

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write tensors, and a few words beside them, as safetensors.

    Raises:
        OutputFailed: the file cannot be written; what was there before still is.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            whole = {key: value.detach().contiguous() for key, value in tensors.items()}
            save_file(whole, partial, metadata=None if notes is None else dict(notes))
            partial.chmod(0o644)  # safetensors writes for the owner alone
            partial.replace(path)
        except SafetensorError as error:  # what it says of a full disk
            raise OSError(str(error)) from error
        finally:
            partial.unlink(missing_ok=True)
