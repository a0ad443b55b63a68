"""The forms of storage, by name."""

from kvhive.stores import dense
from kvhive.stores.base import STORES, LayerFacts, Store, StoreKind

__all__ = ["STORES", "LayerFacts", "Store", "StoreKind"]
_BUILT_IN = (dense,)
