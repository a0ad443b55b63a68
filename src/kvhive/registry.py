"""A name -> class table that answers a typo with the nearest names, filled from a folder."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """Classes by name. Registering a name twice and asking for an unknown one are errors."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make the class known as `name`, and tell it so (`cls.name`).

        Raises `ValueError` for a name that is taken, and `TypeError` for the subclass of a
        dataclass that is none itself: its fields would be no knobs.
        """

        def add(cls: type[T]) -> type[T]:
            if name in self._classes:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            if is_dataclass(cls) and "__dataclass_fields__" not in vars(cls):
                raise TypeError(
                    f"{self.kind} {name!r} is no dataclass: write @dataclass(frozen=True) between "
                    "its registration and its class"
                )
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return add

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            raise ValueError(f"unknown {self.kind} {name!r}; {did_you_mean(name, self._classes)}")
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


def modules_in(path: Iterable[str]) -> list[str]:
    """The public modules of a package (its `__path__`), sorted; those that begin with `_` are not.

    Nothing is imported. Works for folders and for zip files.
    """
    names = [module.name for module in pkgutil.iter_modules(path)]
    return sorted(name for name in names if not name.startswith("_"))


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every public module of a package, in order of name, so that each may register itself.

    A package calls it at its end, with its `__name__` and `__path__`: its modules can then import
    what it defines.
    """
    for name in modules_in(path):
        importlib.import_module(f"{package}.{name}")


def did_you_mean(name: str, known: Mapping[str, object] | list[str]) -> str:
    """'did you mean: a, b?' for near names, else the list of all of them."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean: {', '.join(near)}?" if near else f"known: {', '.join(known)}"
