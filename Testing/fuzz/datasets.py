"""Mutants of labelled sets: tables, JSON lines, folders as benchmarks have them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from .mutations import TRICKY_NAMES, Rng, damaged, damaged_line, damaged_value, pick
from .targets import Target

_ROWS = (
    "image,mask,modality,body_part,label,split,set,caption_terms,cluster",
    "a/0.png,,MR,brain,0,train,a,none,p1",
    "a/1.png,a/1_mask.png,MR,brain,1,test,a,tumour,p2",
    "b/2.png,,US,breast,normal,valid,b,,",
)
_LINES = (
    {"filename": "0.png", "label": 0, "clsname": "a"},
    {"filename": "1.png", "label": 1, "clsname": "a", "mask": "1_mask.png"},
)


class Datasets(Target):
    """A set of images in any layout, read and checked."""

    name = "datasets"
    names_files = True

    def prepare(self, folder: Path) -> None:
        from PIL import Image

        from MedAnomalyCLIPLib import datasets  # noqa: F401

        def png(pixels: np.ndarray) -> bytes:
            Image.fromarray(pixels).save(folder / "p.png")
            return (folder / "p.png").read_bytes()

        self._images = [png(np.arange(72, dtype=np.uint8).reshape(9, 8) + n) for n in range(8)]
        self._mask = png(np.eye(9, 8, dtype=np.uint8) * 255)

    def mutant(self, folder: Path, rng: Rng) -> Path:
        build = pick(rng, (self._table, self._json_lines, self._bmad, self._mvtec))
        return build(folder, rng)

    def look(self, path: Path, output: Path) -> None:
        from MedAnomalyCLIPLib.datasets import check_records, read_dataset
        from MedAnomalyCLIPLib.errors import UnsupportedImage

        records = read_dataset(path)
        if len(records) > 1000:
            raise UnsupportedImage("more images than a fuzzer has time for")
        report = check_records(records)
        report.describe()
        report.require()

    def _put(self, path: Path, content: bytes, rng: Rng) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if rng.random() < 0.12:
            kind = int(rng.integers(4))
            if kind == 0:
                content = damaged(content, rng)
            elif kind == 1:
                path.symlink_to(str(pick(rng, ("/dev/zero", "/etc/passwd", path.name, "..", "/nowhere"))))
                return
            elif kind == 2:
                os.mkfifo(path)
                return
            else:
                return
        path.write_bytes(content)

    def _table(self, folder: Path, rng: Rng) -> Path:
        for name, image in zip(("a/0.png", "a/1.png", "b/2.png"), self._images, strict=False):
            self._put(folder / name, image, rng)
        self._put(folder / "a/1_mask.png", self._mask, rng)
        text = "\n".join(_ROWS) + "\n"
        for _ in range(int(rng.integers(1, 3))):
            text = self._other_cell(text, rng) if rng.random() < 0.5 else damaged_line(text, rng)
        content = text.encode("utf-8", "surrogatepass")
        content = damaged(content, rng) if rng.random() < 0.2 else content
        (folder / "manifest.csv").write_bytes(content)
        return folder

    def _other_cell(self, text: str, rng: Rng) -> str:
        rows = [line.split(",") for line in text.split("\n")]
        row = rows[int(rng.integers(len(rows)))]
        row[int(rng.integers(len(row)))] = str(
            pick(rng, (*TRICKY_NAMES, '"', '""', "x" * 200_000, "\0", "2"))
        )
        return "\n".join(map(",".join, rows))

    def _json_lines(self, folder: Path, rng: Rng) -> Path:
        for name, image in zip(("0.png", "1.png"), self._images, strict=False):
            self._put(folder / "images" / name, image, rng)
        self._put(folder / "images" / "1_mask.png", self._mask, rng)
        lines = [json.dumps(damaged_value(line, rng) if rng.random() < 0.6 else line) for line in _LINES]
        if rng.random() < 0.1:
            lines.append("[" * int(rng.integers(10, 100_000)))
        content = "\n".join(lines).encode()
        place = folder / "samples" / f"{pick(rng, ('train', 'test', 'other'))}.json"
        self._put(place, damaged(content, rng) if rng.random() < 0.3 else content, rng)
        return folder if place.exists() and rng.random() < 0.7 else place

    def _bmad(self, folder: Path, rng: Rng) -> Path:
        root = folder / "Brain_AD"
        for number, split in enumerate(("train", "valid", "test")):
            good, ungood = self._images[number], self._images[number + 3]
            self._put(root / split / "good" / "img" / self._name(rng), good, rng)
            self._put(root / split / "Ungood" / "img" / "1.png", ungood, rng)
            self._put(root / split / "Ungood" / "anomaly_mask" / "1.png", self._mask, rng)
        return pick(rng, (root, folder))

    def _mvtec(self, folder: Path, rng: Rng) -> Path:
        root = folder / "brain"
        self._put(root / "train" / "good" / self._name(rng), self._images[0], rng)
        self._put(root / "test" / "good" / "1.png", self._images[1], rng)
        self._put(root / "test" / "tumour" / "2.png", self._images[2], rng)
        self._put(root / "ground_truth" / "tumour" / "2_mask.png", self._mask, rng)
        return pick(rng, (root, folder))

    def _name(self, rng: Rng) -> str:
        """A name that the file system takes; "0.png" where it takes none of the tricky ones."""
        name = str(pick(rng, TRICKY_NAMES)).replace("/", "_").replace("\0", "")[:200].strip()
        name = name.encode("utf-8", "replace").decode()
        return "0.png" if rng.random() < 0.6 or name in ("", ".", "..") else f"{name}.png"


TARGETS = (Datasets(),)
