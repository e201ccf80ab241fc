"""Operations on batches of activations, one folder each; `reference.py` is documentation, CPU path and oracle in one."""

from jaxemo.kernels.choice import Work, choose
from jaxemo.kernels.ops import project, project_pool, steer_project, top_tokens

__all__ = ["Work", "choose", "project", "project_pool", "steer_project", "top_tokens"]
