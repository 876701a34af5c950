"""The part that serves anywhere: numpy and tokenizers only, no MLflow, no torch, no ONNX Runtime."""
