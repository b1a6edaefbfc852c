"""Training state on disk, as safetensors and JSON; a kill at any moment leaves the last whole one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InvalidRequest, UnreadableImage
from ..tensor_file import write_tensors

_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of Adam and AdamW
_MOST_STEPS = 1e12  # powers of these are numbers


def save_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer | None, notes: Mapping[str, Any]
) -> None:
    """Write modules, optimizer state if there is one, and a few JSON notes into one file."""
    tensors = {
        f"module/{name}/{key}": value.detach().clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    for index, moments in state.items():
        for key, value in moments.items():
            tensors[f"optimizer/{index}/{key}"] = torch.as_tensor(value).detach().clone()
    write_tensors(path, tensors, {"notes": json.dumps(dict(notes))})


def load_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer | None
) -> dict[str, Any]:
    """Put a saved state back, and return its notes.

    Raises:
        UnreadableImage: the file is damaged, or belongs to another architecture.
    """
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {})["notes"])
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for name, module in modules.items():
            prefix = f"module/{name}/"
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                moments.setdefault(int(index), {})[name] = value
        if optimizer is not None:
            _check_moments(moments, optimizer)
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise UnreadableImage(
            f"{path.name} is damaged, or no checkpoint of this training ({error})"
        ) from error
    return notes


def resume(
    path: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer, settings: Mapping[str, Any]
) -> int:
    """Put back what an interrupted training saved, and return the last step that it took; 0 without a file.

    Raises:
        InvalidRequest: it was trained with other settings.
        UnreadableImage: see `load_checkpoint`.
    """
    if not path.is_file():
        return 0
    notes = load_checkpoint(path, modules, optimizer)
    if notes.get("settings") != settings:
        raise InvalidRequest(f"{path.name} was trained with other settings; delete it to start anew")
    return int(notes["step"])


def _check_moments(moments: Mapping[int, Mapping[str, Tensor]], optimizer: Optimizer) -> None:
    """Raise ValueError unless each parameter has all moments, of its own shape, or none."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, found in moments.items():
        if not 0 <= index < len(parameters) or found.keys() != _MOMENTS:
            raise ValueError(f"the optimizer's state of parameter {index} is not whole")
        shapes = {found["exp_avg"].shape, found["exp_avg_sq"].shape, parameters[index].shape}
        if len(shapes) > 1 or found["step"].numel() != 1:
            raise ValueError(f"the optimizer's state of parameter {index} has another shape")
        if not 0 <= float(found["step"]) <= _MOST_STEPS:
            raise ValueError(f"the optimizer has not taken {float(found['step']):g} steps")
