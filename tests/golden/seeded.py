"""Weights made from nothing but their names, so that the golden files of the tiny models need not hold any.

Every value has eight significant bits, so a checkpoint of float32, float16 or bfloat16 holds the very same numbers.
"""

import zlib

import numpy as np

MATRIX, BIAS = 1.6, 0.4  # chosen so that logits are of size 1 to 10, attention is peaked and no bias is negligible


def weights(name: str, shape, plus_one: bool = False) -> np.ndarray:
    """The weight called `name`: a gain from 0.5 to 1.5 (less one where the model adds one, as Gemma does), a
    bias, or a matrix with variance 2 / (in + out), whichever way round it is stored.

    `RandomState` is NumPy's frozen generator: the same numbers in every version.
    """
    random = np.random.RandomState(zlib.crc32(name.encode()))
    stem = name.rsplit(".", 2)[-2] if name.endswith(".weight") else name
    if name.endswith("_blocks"):  # MXFP4: two numbers of 4 bits a byte, and the exponent that 32 of them share
        return random.randint(0, 256, shape).astype(np.uint8)
    if name.endswith("_scales"):
        return (random.randint(122, 126, shape) - 4 * ("down" in name)).astype(np.uint8)
    if name.endswith("inv_freq"):  # buffers that older files carry and nobody reads
        value = np.full(shape, 99.0)
    elif name.endswith("masked_bias"):
        value = np.array(-1e4)
    elif name.endswith(".bias") and len(shape) == 4:
        value = np.tril(np.ones(shape))
    elif name.endswith(("bias", "sinks")):
        value = BIAS * random.standard_normal(shape)
    elif "norm" in stem or stem.startswith("ln_"):
        value = random.uniform(0.5, 1.5, shape) - plus_one
    elif "experts.gate_up_proj" in name:  # large enough that gpt-oss's limits are met
        value = 3 * MATRIX * np.sqrt(2 / sum(shape[-2:])) * random.standard_normal(shape)
    elif name.endswith("experts.down_proj"):
        value = MATRIX / 4 * np.sqrt(2 / sum(shape[-2:])) * random.standard_normal(shape)
    else:
        value = MATRIX * np.sqrt(2 / sum(shape[-2:])) * random.standard_normal(shape)
    mantissa, exponent = np.frexp(value)
    value = np.ldexp(np.round(mantissa * 256) / 256, exponent)
    return np.where(np.abs(value) < 2.0**-14, 0, value).astype(np.float32)


def checkpoint(config: dict, shapes: dict) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint with this config.json and these tensor shapes."""
    plus_one = config["model_type"] in ("gemma", "gemma2", "gemma3", "gemma3_text", "vaultgemma", "nemotron")
    return {name: weights(name, shape, plus_one) for name, shape in shapes.items()}
