"""Samples of a trained model, and measures of their quality."""
