"""Versions of models on Triton servers: published, verified, switched to, rolled back, removed."""
