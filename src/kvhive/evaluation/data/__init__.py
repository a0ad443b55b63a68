"""Evaluation data by name, from a folder, the hub, or made up."""

from kvhive.evaluation.data.catalogue import CATALOGUE, DataSet, Record
from kvhive.evaluation.data.source import Source, open_source

__all__ = ["CATALOGUE", "DataSet", "Record", "Source", "open_source"]
