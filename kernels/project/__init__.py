"""Projection of activations onto directions."""
