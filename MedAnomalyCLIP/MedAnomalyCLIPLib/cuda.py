"""How detectors use an NVIDIA GPU: slices at once, choice of kernels, what is done when memory is full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import DeviceMemoryExhausted

LARGEST_BATCH = 128
"""Beyond it a large tower gains nothing, and the first result comes later."""

_TRIED = 4  # slices of which the need of one is told
_SHARE = 0.7  # of the free memory that is planned with; others use the GPU too, and memory is lost to gaps
_KEPT = 2**30  # bytes for preprocessing and the way back
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def choose_batch_size(device: torch.device, run: Callable[[int], object]) -> int:
    """How many slices to detect on at once: as many as the GPU's free memory holds, 128 at most.

    Args:
        device: a CUDA device.
        run: runs the network on a number of slices, so that its need of memory can be seen.
    """
    try:
        run(_TRIED)  # libraries take what they need for ever, and choose their kernels
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(_TRIED)
    except torch.cuda.OutOfMemoryError:
        return 1
    need = max(1, (torch.cuda.max_memory_allocated(device) - before) // _TRIED)
    count = int((_SHARE * free_memory(device) - _KEPT) // need)
    return max(1, min(LARGEST_BATCH, count - count % 8 if count > 8 else count))


def free_memory(device: torch.device) -> int:
    """Bytes that can be had, those that PyTorch keeps for itself included."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


@contextmanager
def kernels(*, tf32: bool) -> Iterator[None]:
    """Fused attention; and whether products of float32 may be rounded to TF32, all settings of the process.

    PyTorch's fused layer of attention takes its slow way where cuDNN's attention comes first.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = tf32
    try:
        with sdpa_kernel(_ATTENTION):
            yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def exhausted() -> DeviceMemoryExhausted:
    """The error for a GPU on which not even one slice finds room."""
    return DeviceMemoryExhausted(
        "The GPU's memory does not hold a single slice's work; close what else uses the GPU, choose a "
        "smaller detector, or run on the CPU (--device cpu)"
    )


@contextmanager
def exhausted_is_told() -> Iterator[None]:
    """Around work whose need is small and fixed; DeviceMemoryExhausted if there is no memory even for it."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise exhausted() from error
