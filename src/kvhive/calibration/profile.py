"""Profile: tensors that were learnt once about one model, in a safetensors file of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kvhive.files import expanded

KIND = "kvhive profile 1"
_FIELDS = ("method", "fingerprint", "data", "date")


@dataclass(frozen=True, eq=False)
class Profile:
    """What an allocation or a store needs to know about a model beforehand.

    method: what made it and who may read it, e.g. the name of an allocation. fingerprint: of the
    model's weights (`ModelFacts.fingerprint`); for every other model it is refused. data: the text
    it was learnt from, and how much of it. date: ISO 8601, the day it was made. tensors: by name,
    as `method` defines them, on the CPU, never changed: copies of a cache share them.
    """

    method: str
    fingerprint: str
    data: str
    date: str
    tensors: Mapping[str, Tensor]

    def __deepcopy__(self, memo: object) -> Profile:
        return self

    @classmethod
    def of(cls, given: Profile | str | Path) -> Profile:
        """A profile as it is, or the one in a file. Raises as `load`, `TypeError` for neither."""
        if isinstance(given, Profile):
            return given
        if not isinstance(given, str | Path):
            raise TypeError(f"profile: expected a Profile or the name of a file, got {given!r}")
        return cls.load(given)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """From a file that `save` wrote; no code is run.

        Raises `FileNotFoundError`, and `ValueError` for a file that is no profile, is damaged or
        comes from another version.
        """
        from safetensors import SafetensorError, safe_open

        path = expanded(path)
        if not path.is_file():
            raise FileNotFoundError(f"no profile at {str(path)!r}: there is no such file")
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path.name} is no safetensors file, or damaged: {error}") from None
        if told.get("kind") != KIND or any(name not in told for name in _FIELDS):
            raise ValueError(
                f"{path.name} is no profile of this version of kvhive (expected one that says "
                f"{KIND!r}, got {told.get('kind')!r}); make it anew"
            )
        return cls(**{name: told[name] for name in _FIELDS}, tensors=tensors)

    def save(self, path: str | Path, replace: bool = False) -> None:
        """Write it, all or nothing. Raises `FileExistsError` rather than overwrite a file, unless
        it is told to `replace` it.
        """
        from safetensors.torch import save

        path = expanded(path)
        if path.exists() and not replace:
            raise FileExistsError(f"{str(path)!r} exists; delete it first, or choose another name")
        told = {"kind": KIND} | {name: getattr(self, name) for name in _FIELDS}
        whole = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            whole.write_bytes(save(dict(self.tensors), told))  # with the mode of new files
            if replace:
                os.replace(whole, path)
            else:
                os.link(whole, path)  # fails where another process was faster
        finally:
            whole.unlink(missing_ok=True)

    def check(self, method: str, fingerprint: str) -> None:
        """Raises `ValueError` unless it was made by `method` for the model of that fingerprint."""
        if self.method != method:
            raise ValueError(f"expected a profile made by {method!r}, got one by {self.method!r}")
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"this profile of {self.data!r} ({self.date}) was made for a model with "
                "other weights; make one for this model"
            )

    def check_tensors(self, shapes: Mapping[str, str]) -> None:
        """Raises `ValueError` unless the profile holds these tensors, of finite numbers.

        shapes: for each name its sizes, numbers or letters: "T L 2"; a letter is the same size
        everywhere, at least 1.
        """
        sizes: dict[str, int] = {}
        for name, shape in shapes.items():
            tensor, letters = self.tensors.get(name), shape.split()
            if tensor is None:
                raise self._damaged(f"it has no {name!r}")
            same = tensor.dim() == len(letters) and all(
                size == (int(one) if one.isdigit() else sizes.setdefault(one, max(1, size)))
                for one, size in zip(letters, tensor.shape, strict=True)
            )
            if not same:
                raise self._damaged(f"{name!r} has shape {tuple(tensor.shape)}, not ({shape})")
            if not bool(tensor.isfinite().all()):
                raise self._damaged(f"{name!r} holds numbers that are not finite")

    def check_range(self, name: str, least: int, most: int) -> None:
        """Raises `ValueError` unless all numbers of this tensor lie between these."""
        tensor = self.tensors[name]
        if float(tensor.min()) < least or float(tensor.max()) > most:
            raise self._damaged(f"{name!r} is not between {least} and {most}")

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"this profile by {self.method!r} is damaged: {reason}; make it anew")
