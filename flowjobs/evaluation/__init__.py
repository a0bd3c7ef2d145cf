"""Samples of a trained model, and what they are worth."""
