"""ModelConfig: the shape of a transformer, as one frozen dataclass.

It holds what the forward pass needs and nothing about files: the tables in `jaxemo.checkpoints.families` read a
checkpoint's own configuration into it and refuse what they do not understand.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021): at position p, pair i of the first `dim` dimensions of a head turns
    by the angle p · theta^(−2i/dim) / factors[i].

    Every published rescaling of the frequencies is a choice of these numbers; `jaxemo.checkpoints.rope` computes them.
    Two rescalings depend on how long the row is: `long_factors` replace `factors` in rows longer than `original`
    positions (LongRoPE), and `dynamic` lets theta grow with such rows (NTK-aware). A row's length counts the prompt
    and all tokens that may still be generated, so its frequencies never change midway.
    """

    dim: int  # R, how many of a head's dimensions are rotated; even
    theta: float = 10000.0
    factors: tuple[float, ...] = (1.0,)  # one, or R/2 of them
    long_factors: tuple[float, ...] = ()
    dynamic: float = 1.0  # scaling factor s: theta · (s · length/original − (s − 1))^(R/(R−2)) in longer rows
    original: int = 0  # the length that the two rescalings above compare with
    scale: float = 1.0  # cosine and sine are multiplied by it (the attention factor of YaRN and LongRoPE)

    def __post_init__(self):
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"Rope.dim is {self.dim}; rotary embeddings rotate pairs")
        for name in ("factors", "long_factors"):
            if len(getattr(self, name)) not in (1, self.dim // 2) and (name == "factors" or self.long_factors):
                raise ValueError(f"Rope.{name} has {len(getattr(self, name))} numbers; expected 1 or {self.dim // 2}")
        numbers = (self.theta, self.dynamic, self.scale, *self.factors, *self.long_factors)
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError("a Rope's numbers must be above 0 and finite")
        if (self.long_factors or self.dynamic != 1) and self.original < 1:
            raise ValueError("this Rope depends on a row's length but names no `original` length")


@dataclasses.dataclass(frozen=True)
class Attention:
    """What may differ between the attention layers of one model."""

    rope: Rope | None = None  # None: no rotary embedding
    window: int = 0  # a token attends to the last `window` tokens, itself included; 0 is to all


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one decoder-only transformer. Hashable, so it is a static argument of `jax.jit`.

    The dimension letters of the whole project: `B` rows, `T` tokens, `D` d_model, `N` query heads, `K` key/value
    heads, `H` head size, `F` feed-forward width, `V` vocabulary, `L` layers, `S` cache positions, `X` experts; and of
    the directions: `M` steered, `E` read.
    """

    family: str  # the table in checkpoints.families that read it, for example "llama"
    vocab_size: int  # V
    d_model: int  # D, width of the residual stream
    n_layers: int  # L
    n_heads: int  # N
    n_kv_heads: int  # K; N // K query heads share each key/value head (grouped-query attention)
    head_dim: int  # H
    d_ff: int  # F, of each expert where there are experts
    max_positions: int  # longest sequence the model was made for
    tie_embeddings: bool = True  # the unembedding is the transposed embedding

    attention: tuple[Attention, ...] = (Attention(),)  # the kinds of attention layer in this model
    pattern: tuple[int, ...] = ()  # [L] which kind each layer is; () where all are the first
    learned_positions: bool = False  # a trained vector per position is added to the embedding
    attn_scale: float = 0.0  # q · k is multiplied by it; 0 stands for 1/√H
    attn_softcap: float = 0.0  # c: attention logits become c · tanh(logits / c); 0 leaves them
    attn_sinks: bool = False  # each head has a trained logit that takes attention and gives nothing
    qk_norm: str = ""  # norm of queries and keys before rotation: "head" for each, "all" over all heads, "" none

    norm: str = "rms"  # "rms" (RMSNorm) or "layer" (LayerNorm)
    norm_eps: float = 1e-5  # added to the mean square or variance
    norms: tuple[str, ...] = ("attn_norm", "mlp_norm")  # also "attn_post_norm", "mlp_post_norm": of what a branch adds
    parallel: bool = False  # attention and MLP read the same residual stream
    biases: tuple[str, ...] = ()  # the weights that have one: "wq", "w_down", "unembed", "norm" (all LayerNorms), ...

    activation: str = "silu"  # see model.ACTIVATIONS
    gated: bool = True  # the MLP multiplies activation(gate) with a second projection (GLU)
    glu_limit: float = 0.0  # c: the gate is cut off at c, what it gates at ±c and raised by one (gpt-oss); 0 is neither
    n_experts: int = 0  # X; 0 is one dense MLP
    n_active: int = 0  # experts that each token goes through
    normalise_router: bool = True  # the weights of the active experts are made to add up to 1

    embed_scale: float = 1.0  # of the token embeddings
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # c: logits become c · tanh(logits / c); 0 leaves them

    @property
    def outline(self) -> str:
        """What tells this model from others of the same width and depth: vectors made on one are no use on another."""
        return (f"{self.n_layers} layers, d_model {self.d_model}, {self.n_heads} heads ({self.n_kv_heads} key/value) of {self.head_dim}, "
                f"feed-forward {self.d_ff}, vocabulary {self.vocab_size}")  # fmt: skip

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_positions"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"ModelConfig.{name} is {value!r}; it must be a whole number, at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        dims = {kind.rope.dim for kind in self.attention if kind.rope}
        if len(dims) > 1 or max(dims, default=0) > self.head_dim:
            raise ValueError(f"ropes of {sorted(dims)} dimensions do not fit heads of {self.head_dim}")
        if self.pattern and (
            len(self.pattern) != self.n_layers or not set(self.pattern) <= set(range(len(self.attention)))
        ):
            raise ValueError(f"pattern {self.pattern} does not give each of {self.n_layers} layers a kind of attention")
        if not 0 <= self.n_active <= self.n_experts or bool(self.n_active) != bool(self.n_experts):
            raise ValueError(f"{self.n_active} of {self.n_experts} experts cannot be active")
