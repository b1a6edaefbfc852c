"""How images are divided for an experiment: fixed few-shot draws, leave-one-out, cross-task transfer.

Records in, `Fold`s out. Nothing here reads an image, and the same arguments always give the same division.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DatasetInvalid, InvalidRequest
from .records import ImageRecord

_SHOT_LINE = re.compile(r"([an])-(\d+):\s*(.*)")


@dataclass(frozen=True)
class Shots:
    """A few images to learn from.

    Attributes:
        normal: normal images.
        abnormal: abnormal images, perhaps none.
        origin: the seed or the file that they come from, in words.
    """

    normal: tuple[ImageRecord, ...]
    abnormal: tuple[ImageRecord, ...] = ()
    origin: str = ""

    def __post_init__(self) -> None:
        if not self.records:
            raise InvalidRequest("No images were drawn to learn from")

    @property
    def records(self) -> tuple[ImageRecord, ...]:
        return self.normal + self.abnormal


@dataclass(frozen=True)
class Fold:
    """What to learn from, what to choose with, what to score on.

    Attributes:
        name: for tables.
        training, validation, test: images; none of the test images, and no cluster of them, is elsewhere.
    """

    name: str
    training: tuple[ImageRecord, ...]
    validation: tuple[ImageRecord, ...]
    test: tuple[ImageRecord, ...]

    def __post_init__(self) -> None:
        if not self.test:
            raise DatasetInvalid(f"{self.name}: there are no test images")
        seen = {key for record in (*self.training, *self.validation) for key in _identities(record)}
        shared = [record for record in self.test if not seen.isdisjoint(_identities(record))]
        if shared:
            raise DatasetInvalid(
                f"{self.name}: {len(shared)} test images, or others of their patient, are among those "
                f"to learn from, the first is {shared[0].path.name}"
            )


def draw_shots(records: Sequence[ImageRecord], normal: int, abnormal: int = 0, *, seed: int) -> Shots:
    """Draw images of one pool at random.

    The draw depends on the seed and on the names of the images, not on their order or on the folder they
    lie in. With the same seed, a smaller draw is the beginning of a larger one.

    Args:
        records: the pool, for example the validation images of a set.
        normal, abnormal: how many of each to draw.
        seed: of the draw.

    Raises:
        DatasetInvalid: the pool holds fewer.
    """
    chosen = [
        _draw([r for r in records if r.abnormal is wanted], count, word, seed)
        for wanted, count, word in ((False, normal, "normal"), (True, abnormal, "abnormal"))
    ]
    return Shots(chosen[0], chosen[1], f"{normal} normal and {abnormal} abnormal, seed {seed}")


def read_shot_list(path: Path, records: Sequence[ImageRecord], *, draw: int = 0) -> Shots:
    """Take the images that a published list names, in the format of MVFA.

    Lines such as `n-0: a.png b.png` (normal, draw 0) and `a-0: c.png` (abnormal).

    Raises:
        DatasetInvalid: the file lacks that draw, or the pool lacks an image, or has two of its name.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetInvalid(f"{path.name} cannot be read: {error}") from error
    names: dict[tuple[str, int], list[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        matched = _SHOT_LINE.fullmatch(line.strip())
        if matched is None:
            raise DatasetInvalid(f"{path.name}, line {number}: expected 'n-0: name name …' or 'a-0: …'")
        names[matched[1], int(matched[2])] = matched[3].split()
    if ("n", draw) not in names:
        known = sorted({number for kind, number in names if kind == "n"})
        raise DatasetInvalid(f"{path.name} has no normal images for draw {draw}; it has draws {known}")
    kinds = ((False, "n", "normal"), (True, "a", "abnormal"))
    chosen = [
        tuple(_named(records, wanted, name, word, path) for name in names.get((kind, draw), []))
        for wanted, kind, word in kinds
    ]
    return Shots(chosen[0], chosen[1], f"{path.name}, draw {draw}")


def few_shot(records: Sequence[ImageRecord], shots: Shots) -> Fold:
    """Learn from a few images of a set, choose with its other validation images, score on its test split."""
    name = shots.records[0].set
    if any(record.set != name for record in shots.records):
        raise DatasetInvalid("The shots come from several sets; draw them from one")
    own = [record for record in records if record.set == name]
    used = set(shots.records)
    return Fold(
        f"{name}, {len(shots.normal)} + {len(shots.abnormal)} shots",
        shots.records,
        tuple(r for r in own if r.split == "valid" and r not in used),
        _split(own, "test"),
    )


def leave_one_out(
    records: Sequence[ImageRecord], *, learn_from: Sequence[str] = ("train",)
) -> tuple[Fold, ...]:
    """One fold for each set with test images: learn from all other sets, score on this one.

    Args:
        records: several sets.
        learn_from: splits of the other sets to learn from; MVFA's published protocol uses ("test",).

    Raises:
        DatasetInvalid: there are fewer than two sets.
    """
    sets = list(dict.fromkeys(record.set for record in records))
    if len(sets) < 2:
        raise DatasetInvalid(f"Leaving one set out needs at least two sets, not only {', '.join(sets)}")
    folds = []
    for name in sets:
        others = [record for record in records if record.set != name]
        test = tuple(r for r in records if r.set == name and r.split == "test")
        if test:
            training = tuple(r for r in others if r.split in learn_from)
            folds.append(Fold(f"without {name}", training, _split(others, "valid"), test))
    return tuple(folds)


def cross_task(records: Sequence[ImageRecord], shots: Shots) -> tuple[Fold, ...]:
    """Learn from a few images of one set, score on each of the other sets; one fold for each."""
    source = shots.records[0].set
    targets = dict.fromkeys(r.set for r in records if r.set != source and r.split == "test")
    if not targets:
        raise DatasetInvalid(f"There is no set beside {source} that has test images")
    used = set(shots.records)
    validation = tuple(r for r in records if r.set == source and r.split == "valid" and r not in used)
    return tuple(
        Fold(
            f"{source} to {name}",
            shots.records,
            validation,
            tuple(r for r in records if r.set == name and r.split == "test"),
        )
        for name in targets
    )


def _draw(pool: Sequence[ImageRecord], count: int, word: str, seed: int) -> tuple[ImageRecord, ...]:
    if count < 0:
        raise InvalidRequest(f"{count} {word} images cannot be drawn")
    if count > len(pool):
        sets = ", ".join(dict.fromkeys(record.set for record in pool)) or "the set"
        raise DatasetInvalid(f"{count} {word} images are asked for; the pool of {sets} holds {len(pool)}")
    ordered = sorted(pool, key=lambda r: (r.set, r.split, r.path.name, r.slice_at or (0, 0)))
    # Normal and abnormal images are drawn from streams of their own.
    stream = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
    order = np.random.default_rng([seed, stream]).permutation(len(ordered))
    return tuple(ordered[index] for index in order[:count])


def _named(records: Sequence[ImageRecord], abnormal: bool, name: str, word: str, file: Path) -> ImageRecord:
    found = [r for r in records if r.abnormal is abnormal and r.path.name == name]
    if len(found) != 1:
        how = "is not among" if not found else f"is {len(found)} times among"
        raise DatasetInvalid(f"{file.name}: {name} {how} the {word} images of the pool")
    return found[0]


def _split(records: Iterable[ImageRecord], split: str) -> tuple[ImageRecord, ...]:
    return tuple(record for record in records if record.split == split)


def _identities(record: ImageRecord) -> tuple[object, ...]:
    """What must not be on both sides: the image itself, and its cluster if it has one."""
    image = (record.path, record.slice_at)
    return (image, (record.set, record.cluster)) if record.cluster else (image,)
