"""Operations on batches of activations, one folder each; `reference.py` is documentation, CPU path and oracle in one."""

from jaxemo.kernels.project.reference import project

__all__ = ["project"]
