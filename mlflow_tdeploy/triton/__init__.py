"""NVIDIA Triton Inference Server: a local one for trying things out, and for the tests."""
