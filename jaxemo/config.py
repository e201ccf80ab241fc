"""ModelConfig: the shape of a transformer, as one frozen dataclass.

It holds what the forward pass needs and nothing about files: the tables in `jaxemo.checkpoints.families` read a
checkpoint's own configuration into it and refuse what they do not understand.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one decoder-only transformer. Hashable, so it is a static argument of `jax.jit`.

    The dimension letters of the whole project: `B` rows, `T` tokens, `D` d_model, `N` query heads, `K` key/value
    heads, `H` head size, `F` feed-forward width, `V` vocabulary, `L` layers, `S` cache positions; and of the
    directions: `M` steered, `E` read.
    """

    family: str  # the table in checkpoints.families that read it, for example "llama"
    vocab_size: int  # V
    d_model: int  # D, width of the residual stream
    n_layers: int  # L
    n_heads: int  # N
    n_kv_heads: int  # K; N // K query heads share each key/value head (grouped-query attention)
    head_dim: int  # H
    d_ff: int  # F
    max_positions: int  # longest sequence the model was trained on
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    rope_theta: float = 10000.0  # base of the rotary frequencies
    tie_embeddings: bool = True  # the unembedding is the transposed embedding

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings rotate pairs")
