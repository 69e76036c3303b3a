"""Pretrained mappings from inputs to features, and the catalogue of them."""

from metafit.backbones.base import Backbone, wrap

__all__ = ["Backbone", "wrap"]
