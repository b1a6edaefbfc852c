"""The tensors of a TorchScript archive, as OpenAI's CLIP files are, read without running what is in it.

`torch.jit.load` would load the archive's code, and `torch.load(weights_only=True)` refuses such archives.
Here the code is never looked at: of the pickled module, only tensors and plain containers are rebuilt.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..errors import UnreadableImage
from ..limits import limits

_LARGEST_PICKLE = 64 * 2**20  # OpenAI's have half a megabyte; tensors lie in files of their own
_PLAIN = {
    *("PROTO", "STOP", "FRAME", "MEMOIZE", "MARK", "POP", "POP_MARK"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
    *("GLOBAL", "BINPERSID", "REDUCE", "NEWOBJ", "BUILD"),
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of a scripted or traced module, and its table of contents is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return False  # NotImplementedError is what zipfile says of archives of later versions than it reads


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Every tensor of the module in an archive, named as in its `state_dict()`; buffers are among them.

    Raises:
        UnreadableImage: the archive is damaged, or its pickle asks for more than tensors and containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = _tensors(_Reader(archive).read(), "", set())
            tensors = dict(itertools.islice(found, limits().weights_names + 1))
        if len(tensors) > limits().weights_names:
            raise UnreadableImage(f"it has more than {limits().weights_names:,} tensors")
        return tensors
    except UnreadableImage as error:
        raise UnreadableImage(f"{path.name} was not read: {error}") from error
    # A damaged pickle can fail in any of these ways, a damaged archive in the first three.
    except (
        *(zipfile.BadZipFile, OSError, KeyError, pickle.UnpicklingError, EOFError, ValueError, TypeError),
        *(IndexError, AttributeError, RuntimeError, RecursionError, NotImplementedError, OverflowError),
    ) as error:
        raise UnreadableImage(f"{path.name} is a damaged TorchScript archive: {error}") from error


class _Module:
    """Stands for a class of the archive's own code: keeps the state, has no behaviour."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise UnreadableImage("a module in it has a state that is no dictionary")
        self.state = state


class _Reader(pickle.Unpickler):
    """Unpickles a module's description. What is allowed is listed; all else is refused before it is done."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        names = [n for n in archive.namelist() if PurePosixPath(n).name == "data.pkl"]
        if len(names) != 1:
            raise UnreadableImage("it has not exactly one data.pkl")
        self._archive = archive
        self._folder = PurePosixPath(names[0]).parent
        description = self._stored(names[0], _LARGEST_PICKLE)
        _check_opcodes(description)
        super().__init__(io.BytesIO(description))
        self._storages: dict[str, Tensor] = {}
        if str(self._folder / "byteorder") in archive.namelist() and (
            self._stored(str(self._folder / "byteorder"), 16) != b"little"
        ):
            raise UnreadableImage("its numbers are not stored in little-endian order")

    def read(self) -> Any:
        return self.load()

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return type("Module", (_Module,), {})  # a new one, so that no state can reach another archive
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _view(storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in _LISTS:
            return lambda values, *_: values
        raise UnreadableImage(
            f"it asks for {module}.{name}, which weights do not need; nothing of it was run"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(count, int):
            raise UnreadableImage("it refers to something that is no tensor storage")
        if key not in self._storages:
            size = count * dtype.itemsize
            data = self._stored(str(self._folder / "data" / str(key)), size)
            if len(data) != size:
                raise UnreadableImage(f"tensor storage {key} has {len(data)} bytes, not {size}")
            self._storages[key] = (
                torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)
            )
        return self._storages[key]

    def _stored(self, name: str, largest: int) -> bytes:
        """A file of the archive, which torch never compresses."""
        entry = self._archive.getinfo(name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > largest:
            raise UnreadableImage(f"{name} in it is compressed or larger than it should be")
        return self._archive.read(entry)


def _check_opcodes(description: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(description):
        if opcode.name not in _PLAIN:
            raise UnreadableImage(f"it holds the pickle instruction {opcode.name}, which weights do not need")
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(description):
            raise UnreadableImage("it asks for more memory than it can need")


def _view(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The part of a storage that a tensor is; torch refuses what lies beyond."""
    if math.prod(size) > len(storage):
        raise UnreadableImage("a tensor in it has more values than are stored")
    return torch.as_strided(storage, size, stride, offset)


def _tensors(value: Any, name: str, above: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a module and of all modules in it, dots between the names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, _Module):
        if id(value) in above:
            raise UnreadableImage("a module in it contains itself")
        for key, part in value.state.items():
            yield from _tensors(part, f"{name}.{key}" if name else str(key), {*above, id(value)})
