"""Pretrained mappings from inputs to features, and the catalogue of them."""

from metafit.backbones.base import Backbone, wrap
from metafit.backbones.catalog import DEFAULTS, Entry, catalog, load
from metafit.backbones.packing import pack

__all__ = ["DEFAULTS", "Backbone", "Entry", "catalog", "load", "pack", "wrap"]
