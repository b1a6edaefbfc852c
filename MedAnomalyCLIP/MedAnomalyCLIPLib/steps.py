"""Long work as a generator: it yields after each step and returns what it made.

So the same work can be done at once, step by step between other work, or be left at any step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import Cancelled

T = TypeVar("T")
Y = TypeVar("Y")
Z = TypeVar("Z")


@dataclass(frozen=True)
class Step:
    """How far a stage of the work has come.

    Attributes:
        stage: which one, a word for programs.
        done, total: its parts.
    """

    stage: str
    done: int
    total: int


def run_steps(
    steps: Generator[Y, Any, T],
    on_step: Callable[[Y], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> T:
    """Do all steps; returns what they return.

    Args:
        steps: the work; closed when it is left early.
        on_step: called with what each step yields.
        is_cancelled: asked before each step.

    Raises:
        Cancelled: `is_cancelled` said so.
    """
    try:
        while True:
            if is_cancelled is not None and is_cancelled():
                raise Cancelled("Stopped before it was done")
            yielded = next(steps)
            if on_step is not None:
                on_step(yielded)
    except StopIteration as end:
        return end.value
    finally:
        steps.close()


def mapped(steps: Generator[Y, Any, T], change: Callable[[Y], Z]) -> Generator[Z, None, T]:
    """The same work, with something else made of what its steps yield."""
    try:
        while True:
            yield change(next(steps))
    except StopIteration as end:
        return end.value
    finally:
        steps.close()
