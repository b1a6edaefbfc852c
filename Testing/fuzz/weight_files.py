"""Mutants of files of weights: torch's archives and older files, TorchScript, safetensors, checkpoints."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bundles import damaged_weights
from .mutations import BOMB_BYTES, TRICKY_NAMES, Rng, damaged, pick
from .targets import Target


class Weights(Target):
    """A file as `convert` reads it."""

    name = "weights"
    memory = 2 << 30

    def prepare(self, folder: Path) -> None:
        import torch

        torch.set_num_threads(1)
        state = {
            "state_dict": {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2).half()},
            "epoch": 3,
        }
        torch.save(state, folder / "zip.pth")
        torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
        layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval()
        torch.jit.trace(layer, torch.zeros(2, 3)).save(str(folder / "script.pt"))
        from safetensors.torch import save_file

        save_file(layer.state_dict(), folder / "flat.safetensors")
        self._seeds = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
        for path in sorted(folder.iterdir()):
            self._look(path)

    def mutant(self, folder: Path, rng: Rng) -> Path:
        name = pick(rng, list(self._seeds))
        content = self._seeds[name]
        kind = rng.random()
        if name.endswith(".safetensors"):
            content = damaged_weights(content, rng) if kind < 0.6 else damaged(content, rng)
        elif name == "old.pth":
            content = damaged(content, rng) if kind < 0.7 else _odd_pickle(rng)
        elif kind < 0.35:
            content = damaged(content, rng)
        else:
            content = _archive_changed(content, rng)
        (folder / name).write_bytes(content)
        return folder / name

    def look(self, path: Path, output: Path) -> None:
        self._look(path)

    def _look(self, path: Path) -> None:
        from MedAnomalyCLIPLib.clip.weights import flattened, read_clip_state, read_weights

        flattened(read_weights(path))
        read_clip_state(path)


class Checkpoints(Target):
    """The state of a training that is to go on."""

    name = "checkpoints"
    memory = 2 << 30

    def prepare(self, folder: Path) -> None:
        import torch

        from MedAnomalyCLIPLib.training.checkpoint import save_checkpoint

        torch.set_num_threads(1)
        module, optimizer = self._fresh()
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        save_checkpoint(folder / "c.safetensors", {"m": module}, optimizer, {"step": 1})
        self._seed = (folder / "c.safetensors").read_bytes()

    def _fresh(self) -> tuple[Any, Any]:
        import torch

        module = torch.nn.Linear(3, 4)
        return module, torch.optim.AdamW(module.parameters())

    def mutant(self, folder: Path, rng: Rng) -> Path:
        path = folder / "c.safetensors"
        change = damaged_weights if rng.random() < 0.6 else damaged
        path.write_bytes(change(self._seed, rng))
        return path

    def look(self, path: Path, output: Path) -> None:
        import torch

        from MedAnomalyCLIPLib.training.checkpoint import load_checkpoint

        module, optimizer = self._fresh()
        load_checkpoint(path, {"m": module}, optimizer)
        optimizer.zero_grad()
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()


def _archive_changed(content: bytes, rng: Rng) -> bytes:
    """Files in the archive damaged, renamed, doubled, compressed, or made to unpack without end."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    victim = pick(rng, list(files))
    kind = int(rng.integers(6))
    method = zipfile.ZIP_STORED
    if kind == 0:
        pickles = [name for name in files if name.endswith(".pkl")]
        victim = pick(rng, pickles)
        files[victim] = damaged(files[victim], rng)
    elif kind == 1:
        files[str(pick(rng, TRICKY_NAMES)) or "x"] = files.pop(victim)
    elif kind == 2:
        method = zipfile.ZIP_DEFLATED
    elif kind == 3:
        storages = [name for name in files if "/data/" in name] or [victim]
        victim, method = pick(rng, storages), zipfile.ZIP_DEFLATED
        files[victim] = bytes(BOMB_BYTES // 2)
    elif kind == 4:
        pickles = [name for name in files if name.endswith("data.pkl")] or [victim]
        files[pickles[0]] = _odd_pickle(rng)
    else:
        del files[victim]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method, compresslevel=1) as archive:
        for name, data in files.items():
            archive.writestr(name.replace("\ud800", "?"), data)
    return packed.getvalue()


class _Runs:
    """Would run a command when it is unpickled by whoever runs what a pickle says."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        import os

        return os.system, ("touch /tmp/escaped",)


def _odd_pickle(rng: Rng) -> bytes:
    """Code to run, dictionaries that hold themselves or double at each level, depth, and odd keys."""
    kind = int(rng.integers(6))
    if kind == 0:
        return pickle.dumps({"a": _Runs()}, protocol=2)
    if kind == 1:
        ring: dict[str, Any] = {}
        ring["a"] = ring
        return pickle.dumps(ring, protocol=2)
    if kind == 2:
        doubled: dict[str, Any] = {"x": 1}
        for _ in range(40):
            doubled = {"a": doubled, "b": doubled}
        return pickle.dumps(doubled, protocol=2)
    if kind == 3:
        return b"\x80\x02" + b"]" * int(rng.integers(100, 200_000)) + b"a" * 50 + b"."
    if kind == 4:
        return pickle.dumps({1: 2, None: 3, (4, 5): [6], b"k": {}, "deep": _deep(400)}, protocol=2)
    return b"\x80\x02X" + (2**31 - 1).to_bytes(4, "little") + b"abc."


def _deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


TARGETS = (Weights(), Checkpoints())
