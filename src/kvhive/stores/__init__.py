"""The forms of storage, by name. A new one is a new file here."""

from kvhive.registry import import_all
from kvhive.stores.base import STORES, LayerFacts, Store, StoreKind

__all__ = ["STORES", "LayerFacts", "Store", "StoreKind"]

import_all(__name__, __path__)
