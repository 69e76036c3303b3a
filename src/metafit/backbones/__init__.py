"""Pretrained mappings from inputs to features, and the catalogue of them."""

from metafit.backbones.base import Backbone, wrap
from metafit.backbones.catalog import Entry, catalog, load

__all__ = ["Backbone", "Entry", "catalog", "load", "wrap"]
