"""Words for generated tasks: common English nouns, all different, no plurals."""

from __future__ import annotations

from importlib.resources import files

NOUNS = tuple(files("kvhive.evaluation").joinpath("nouns.txt").read_text("utf-8").split())
