"""Mutants of recipes: TOML and JSON files, single changes as the command line takes them."""

from __future__ import annotations

import json
from pathlib import Path

from .mutations import TRICKY_NAMES, Rng, damaged, damaged_line, damaged_value, pick
from .targets import Target


class Recipes(Target):
    """A file and changes, read into a checked recipe."""

    name = "recipes"

    def prepare(self, folder: Path) -> None:
        from MedAnomalyCLIPLib.configuration import to_mapping
        from MedAnomalyCLIPLib.training.recipe import RECIPES, read_recipe

        self._toml = [path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.toml"))]
        self._json = [to_mapping(read_recipe(name)) for name in ("mediclip", "memory", "diffusionclip")]

    def mutant(self, folder: Path, rng: Rng) -> Path:
        if rng.random() < 0.5:
            path = folder / "mine.toml"
            text = damaged_line(pick(rng, self._toml), rng)
            if rng.random() < 0.2:
                base = json.dumps(str(pick(rng, (*TRICKY_NAMES, "mine.toml", "mediclip"))))
                text = f"base = {base}\n{text}"
            content = text.encode("utf-8", "replace")
        else:
            path = folder / "mine.json"
            data = damaged_value(pick(rng, self._json), rng)
            content = json.dumps(
                data if rng.random() < 0.7 else {**_mapping(data), "base": "mediclip"}
            ).encode()
        path.write_bytes(damaged(content, rng) if rng.random() < 0.25 else content)
        changes = [self._change(rng) for _ in range(int(rng.integers(0, 3)))]
        (folder / "changes").write_text(json.dumps(changes))
        return path

    def _change(self, rng: Rng) -> str:
        keys = (
            "optimisation.epochs",
            "data.sets",
            "detector.tower.taps",
            "clip",
            "start",
            "preset",
            "a.b.c",
            "",
        )
        values = (*TRICKY_NAMES, "[1, 2]", "nan", "-1", "{}", "'x'", "[" * 500, "1e400", "2024-01-01")
        return f"{pick(rng, keys)}={pick(rng, values)}".replace("\ud800", "?")

    def look(self, path: Path, output: Path) -> None:
        from MedAnomalyCLIPLib.configuration import to_mapping
        from MedAnomalyCLIPLib.training.recipe import read_recipe

        changes = json.loads((path.parent / "changes").read_text())
        json.dumps(to_mapping(read_recipe(path, changes)), allow_nan=False)


def _mapping(data: object) -> dict[str, object]:
    return data if isinstance(data, dict) else {"x": data}


TARGETS = (Recipes(),)
