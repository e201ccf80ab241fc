"""Emotion directions: corpus, extraction, geometry and validation, on top of any LanguageModel."""

from jaxemo.emotions.conditions import conditions
from jaxemo.emotions.corpus import Corpus, Story
from jaxemo.emotions.extraction import extract
from jaxemo.emotions.vectors import EmotionVectors

__all__ = ["Corpus", "EmotionVectors", "Story", "conditions", "extract"]
