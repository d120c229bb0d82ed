"""Weights on disk: this project's checkpoints, and files made elsewhere."""
