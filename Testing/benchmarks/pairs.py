"""Time contenders interleaved in one run, and compare them round by round.

Machines are noisy, and slow for minutes at a time. So every contender runs once in each round, in an order
drawn anew, and two of them are compared by the ratio of their times within a round, never by times of
different rounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Work = Callable[[np.ndarray], object]


@dataclass(frozen=True)
class Contender:
    """Something that is timed.

    Attributes:
        name: in the table.
        work: takes one image, (H, W) uint16, to whatever it makes of it.
        every: it runs in each n-th round alone, for what takes seconds.
    """

    name: str
    work: Work
    every: int = 1


@dataclass(frozen=True)
class Ratio:
    """How many times longer one contender took than another in the same rounds.

    Attributes:
        median, low, high: over rounds; low and high are the 10th and 90th percentile.
        rounds: in which both ran.
    """

    median: float
    low: float
    high: float
    rounds: int


Times = dict[str, dict[int, float]]  # seconds, by name and round


def interleaved(
    contenders: Sequence[Contender],
    images: Sequence[np.ndarray],
    rounds: int,
    *,
    seed: int = 0,
    on_round: Callable[[int, int], None] | None = None,
) -> Times:
    """Seconds of each contender in each round, after one that is not counted."""
    order = random.Random(seed)
    times: Times = {contender.name: {} for contender in contenders}
    for contender in contenders:
        contender.work(images[0])
    for number in range(rounds):
        image = images[number % len(images)]
        for contender in order.sample(list(contenders), len(contenders)):
            if number % contender.every == 0:
                started = time.perf_counter()
                contender.work(image)
                times[contender.name][number] = time.perf_counter() - started
        if on_round is not None:
            on_round(number + 1, rounds)
    return times


def ratio(times: Times, slow: str, fast: str) -> Ratio:
    """How many times longer `slow` took than `fast`."""
    both = sorted(times[slow].keys() & times[fast].keys())
    found = np.array([times[slow][number] / times[fast][number] for number in both])
    low, median, high = np.percentile(found, [10, 50, 90])
    return Ratio(float(median), float(low), float(high), len(both))


def milliseconds(times: Times, name: str) -> float:
    """Median time of a contender."""
    return 1000 * float(np.median(list(times[name].values())))
