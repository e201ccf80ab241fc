"""jaxemo: emotion directions inside open-weight language models, read and steered in one compiled JAX program."""

from jaxemo import checkpoints, emotions, kernels, steering, tokens
from jaxemo.capture import Capture
from jaxemo.config import ModelConfig
from jaxemo.emotions import EmotionVectors
from jaxemo.grid import Grid, sweep
from jaxemo.language_model import Generation, LanguageModel, Output, Reading, load
from jaxemo.steering import Steering
from jaxemo.tokens import TokenBatch

__version__ = "0.1.0"
__all__ = ["Capture", "EmotionVectors", "Generation", "Grid", "LanguageModel", "ModelConfig", "Output", "Reading", "Steering", "TokenBatch",
           "checkpoints", "emotions", "kernels", "load", "steering", "sweep", "tokens"]  # fmt: skip
