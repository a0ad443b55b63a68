"""Kept: the parts of a learning that are done, in a file, so that it can be stopped at any time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvhive.files import write_whole

KIND = "kvhive learning under way 1"


def partial_file(out: Path) -> Path:
    """Where the parts of a profile that will be written to `out` are kept meanwhile."""
    return out.with_name(f"{out.name}.partial")


@dataclass(frozen=True, eq=False)
class Kept:
    """Named parts, each some tensors by name, on the CPU; all of them lie in one file.

    path: of the file, which is there as soon as a part is. belongs: tells what is learnt, from what
    and with which settings; a file that was begun for something else is refused.
    """

    path: Path
    belongs: str
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, belongs: str) -> Kept:
        """With the parts of an earlier run, if there was one.

        Raises `ValueError` for a file that is damaged, no file of ours, or was begun for something
        else.
        """
        kept = cls(path, belongs)
        if not path.exists():
            return kept
        advice = "delete it to begin anew, or give the profile another name"
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged ({error}); {advice}") from None
        if told.get("kind") != KIND or told.get("belongs") != belongs:
            raise ValueError(
                f"{str(path)!r} was begun with another model, other texts or other settings; "
                f"{advice}"
            )
        for name, tensor in tensors.items():
            key, _, inner = name.rpartition("/")
            kept.parts.setdefault(key, {})[inner] = tensor
        return kept

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The part of that name; None: it is not done yet."""
        return self.parts.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a part: in the file, whole or not at all. Tensors are named without `/`."""
        self.parts[key] = {name: value.detach().cpu() for name, value in tensors.items()}
        named = {
            f"{key}/{name}": value.contiguous()
            for key, part in self.parts.items()
            for name, value in part.items()
        }
        write_whole(self.path, save(named, {"kind": KIND, "belongs": self.belongs}))

    def remove(self) -> None:
        """All is done: the file goes."""
        self.path.unlink(missing_ok=True)
