"""Which profile a recipe reads: the one given, the one a knob names, or the one that is shipped."""

from __future__ import annotations

from kvhive.allocations import Allocation
from kvhive.calibration import Profile
from kvhive.calibration.shipped import shipped
from kvhive.model.facts import ModelFacts
from kvhive.model.outline import Outline
from kvhive.recipe import Recipe
from kvhive.stores import StoreKind


def profile_for(recipe: Recipe, facts: ModelFacts, given: Profile | None = None) -> Profile | None:
    """The profile that the recipe reads with this model; None: it reads none.

    given: goes before the file that a knob names, and that before a shipped one.
    Raises `ValueError` for a profile that is missing, not read, damaged or of another model, and
    `FileNotFoundError` for a file that is not there.
    """
    method = _method(recipe)
    if method is None:
        if given is not None:
            raise ValueError(f"{recipe} reads no profile, but one by {given.method!r} was given")
        return None
    profile = given or _named(recipe)
    if profile is None:
        known = (one for one in shipped(method) if one.fingerprint == facts.fingerprint)
        profile = next(known, None)
    if profile is None:
        raise _missing(method, "this model")
    profile.check(method, facts.fingerprint)
    config = facts.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for part in _readers(recipe):
        part.check_profile(profile, len(facts.full_layers), heads)
    return profile


def profile_by_shape(recipe: Recipe, outline: Outline) -> Profile | None:
    """As `profile_for`, for a model that is not loaded: a profile that fits its layers and heads.

    What a cache takes depends little on whose it is. Raises `ValueError` and `FileNotFoundError`.
    """
    method = _method(recipe)
    if method is None:
        return None
    named = _named(recipe)
    heads = outline.shapes[outline.full_layers[0]].kv_heads
    for profile in shipped(method) if named is None else (named,):
        try:
            for part in _readers(recipe):
                part.check_profile(profile, len(outline.full_layers), heads)
        except ValueError:
            if named is not None:
                raise
        else:
            return profile
    raise _missing(method, "a model of such layers and heads")


def _readers(recipe: Recipe) -> list[Allocation | StoreKind]:
    """The parts that read a profile, all of them by one method."""
    parts: tuple[Allocation | StoreKind, ...] = recipe.allocation, recipe.store
    return [part for part in parts if part.calibration is not None]


def _method(recipe: Recipe) -> str | None:
    return next((part.calibration for part in _readers(recipe)), None)


def _named(recipe: Recipe) -> Profile | None:
    files = (part.profile_file for part in _readers(recipe))
    file = next((file for file in files if file is not None), None)
    return None if file is None else Profile.load(file)


def _missing(method: str, model: str) -> ValueError:
    return ValueError(
        f"{method} reads a profile, and none of {model} comes with kvhive: make one with kvhive "
        f"calibrate --model MODEL --for {method} -o FILE, and write {method}(profile='FILE')"
    )
