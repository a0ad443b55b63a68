"""The forms of storage, by name."""

from kvhive.stores import dense
from kvhive.stores.base import STORES, Store, StoreKind

__all__ = ["STORES", "Store", "StoreKind"]
_BUILT_IN = (dense,)
