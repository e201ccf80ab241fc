"""The forward pass in float64 NumPy: what the compiled one has to agree with.

One row, one token, one head at a time, in the order of the papers: no batch, no padding, no mask, no cache, no scan.
The steering formula is written for one vector. `rounded` turns it into the plain low-precision implementation that the
bfloat16 path is measured against.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")


class Act(NamedTuple):
    """One intervention on one row: `kind` is "add", "set" or "dampen"; positions are absolute."""

    kind: str
    directions: np.ndarray  # [L, D], any length
    value: float
    layers: Collection[int]
    positions: Collection[int]


class Run(NamedTuple):
    logits: np.ndarray  # [T, V]
    sites: dict[str, np.ndarray]  # each [L, T, D]
    dose: np.ndarray  # [L, T]


def exact(x):
    return x


def to_bfloat16(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def as_float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), params)


def rms_norm(x, gain, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * gain


def rotate(vector, position, theta):
    """Each pair (i, i + H/2) is a complex number, turned by position · theta^(−2i/H)."""
    half = len(vector) // 2
    turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def intervene(x, acts: Sequence[tuple[str, np.ndarray, float]], keep_norm=False):
    """`x [D]` after acts (kind, direction, value), all of which see the same x.

    Projections that are set together are the smallest change that reaches all of them.
    """
    change = np.zeros_like(x)
    rows, missing = [], []
    for kind, direction, value in acts:
        unit = direction / np.sqrt(np.sum(direction**2))
        if kind == "add":
            change += value * unit
        elif kind == "dampen":
            change -= value * np.dot(x, unit) * unit
        else:
            rows.append(unit)
            missing.append(value - np.dot(x, unit))
    if rows:
        change += np.linalg.lstsq(np.array(rows), np.array(missing), rcond=1e-6)[0]
    y = x + change
    return y * (np.linalg.norm(x) / np.linalg.norm(y)) if keep_norm and change.any() else y


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def forward(config, params, ids, acts: Sequence[Act] = (), keep_norm=False, rounded=exact) -> Run:
    """Run one unpadded row of token ids with `params` in float64, layers separate."""
    T, H, shared = len(ids), config.head_dim, config.n_heads // config.n_kv_heads
    residual = [params["embed"][i] for i in ids]
    sites = {site: [] for site in SITES}
    doses = []
    for number, w in enumerate(params["layers"]):
        sites["resid_pre"].append(np.array(residual))
        queries, keys, values = [], [], []
        for t in range(T):
            x = rounded(rms_norm(residual[t], w["attn_norm"], config.norm_eps))
            project = lambda name, x=x, w=w: rounded(np.tensordot(x, w[name], 1))  # noqa: E731
            queries.append([rounded(rotate(head, t, config.attention[0].rope.theta)) for head in project("wq")])
            keys.append([rounded(rotate(head, t, config.attention[0].rope.theta)) for head in project("wk")])
            values.append(project("wv"))
        attn_outs, mlp_outs, steered, dose = [], [], [], []
        for t in range(T):
            heads = []
            for n in range(config.n_heads):
                scores = np.array([np.dot(queries[t][n], keys[s][n // shared]) for s in range(t + 1)]) / np.sqrt(H)
                p = rounded(softmax(scores))
                heads.append(rounded(sum(p[s] * values[s][n // shared] for s in range(t + 1))))
            attn_out = rounded(np.tensordot(np.array(heads), w["wo"], 2))
            middle = rounded(residual[t] + attn_out)
            x = rounded(rms_norm(middle, w["mlp_norm"], config.norm_eps))
            gate = rounded(x @ w["w_gate"])
            hidden = rounded(rounded(gate / (1 + np.exp(-gate))) * rounded(x @ w["w_up"]))
            mlp_out = rounded(hidden @ w["w_down"])
            after = rounded(middle + mlp_out)
            here = [(a.kind, a.directions[number], a.value) for a in acts if number in a.layers and t in a.positions]
            steered.append(rounded(intervene(after, here, keep_norm)))
            dose.append(np.linalg.norm(steered[t] - after) / np.linalg.norm(after))
            attn_outs.append(attn_out)
            mlp_outs.append(mlp_out)
        residual = steered
        for site, rows in zip(SITES[1:], (attn_outs, mlp_outs, steered), strict=True):
            sites[site].append(np.array(rows))
        doses.append(dose)
    unembed = params["embed" if config.tie_embeddings else "unembed"]
    final = [rounded(rms_norm(x, params["final_norm"], config.norm_eps)) for x in residual]
    return Run(np.array(final) @ unembed.T, {site: np.array(found) for site, found in sites.items()}, np.array(doses))


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
