"""Where weights come from: the registry, file formats, and one conversion table a model family."""

from jaxemo.checkpoints.keys import CheckpointError
from jaxemo.checkpoints.registry import REGISTRY, cache_dir, pull, resolve

__all__ = ["REGISTRY", "CheckpointError", "cache_dir", "pull", "resolve"]
