"""Asks a deployed text model as any program can: ``tritonclient``, over HTTP and gRPC; no MLflow and no tokenizer here.

python examples/triton_client.py --http localhost:8000 --grpc localhost:8001 minilm "a text" "another text"
"""

from __future__ import annotations

import argparse

import numpy as np
import tritonclient.grpc
import tritonclient.http


def ask(module, address: str, model: str, texts: list[str]) -> dict[str, np.ndarray]:
    """Send texts, one a row, and return every output by name."""
    client = module.InferenceServerClient(address)
    rows = np.array([text.encode() for text in texts], dtype=object).reshape(-1, 1)
    tensor = module.InferInput("text", rows.shape, "BYTES")
    tensor.set_data_from_numpy(rows)
    result = client.infer(model, [tensor])
    response = result.get_response()
    outputs = response["outputs"] if isinstance(response, dict) else response.outputs
    names = [one["name"] if isinstance(one, dict) else one.name for one in outputs]
    client.close()
    return {name: result.as_numpy(name) for name in names}


def main() -> None:
    """Ask over whatever addresses are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--http", help="host:port")
    parser.add_argument("--grpc", help="host:port")
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+")
    options = parser.parse_args()
    for name, module, address in (
        ("http", tritonclient.http, options.http),
        ("grpc", tritonclient.grpc, options.grpc),
    ):
        if address:
            for output, array in ask(module, address, options.model, options.texts).items():
                print(f"{name} {output} {array.shape} {np.array2string(array[0][:3], precision=4)}")


if __name__ == "__main__":
    main()
