"""Sampling of causal convolutional models pixel by pixel: drawing rules and executors of its programs."""
