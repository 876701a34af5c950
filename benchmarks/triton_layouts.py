"""Repositories to compare with: the layout of transformer-deploy, and a model that does nothing.

That layout (https://github.com/ELS-RD/transformer-deploy): a Python model that tokenizes, the graph, and an ensemble of
the two, all with ``max_batch_size: 0``, so that Triton joins no requests. Here its tokenizer is the fast library alone,
which is more than it had, and graph and backend are those of ours.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mlflow_tdeploy.core.hardware import usable_cores

TOKENIZER_MODEL = """
import os
import numpy as np
import triton_python_backend_utils as triton
from tokenizers import Tokenizer

class TritonPythonModel:
    def initialize(self, args):
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        self.tokenizer.enable_truncation(256)
        self.tokenizer.enable_padding()

    def execute(self, requests):
        responses = []
        for request in requests:
            texts = [one.decode() for one in triton.get_input_tensor_by_name(request, "TEXT").as_numpy().tolist()]
            rows = self.tokenizer.encode_batch(texts)
            arrays = {
                "input_ids": [one.ids for one in rows], "attention_mask": [one.attention_mask for one in rows],
                "token_type_ids": [one.type_ids for one in rows],
            }
            responses.append(triton.InferenceResponse(
                [triton.Tensor(name, np.array(value, np.int64)) for name, value in arrays.items()]))
        return responses
"""
EMPTY_MODEL = """
import os
import numpy as np
import triton_python_backend_utils as triton

class TritonPythonModel:
    def execute(self, requests):
        return [triton.InferenceResponse([triton.Tensor("y", np.zeros((1, 384), np.float32))]) for _ in requests]
"""
_IDS = ("input_ids", "attention_mask", "token_type_ids")


def write_transformer_deploy(repository: Path, graph: Path, tokenizer: Path) -> list[str]:
    """Write the layout; return the models in the order to load them."""
    inner = "".join(f'output {{name: "{name}" data_type: TYPE_INT64 dims: [-1, -1]}}\n' for name in _IDS)
    _model(
        repository,
        "td_tokenize",
        f'backend: "python"\nmax_batch_size: 0\ninput {{name: "TEXT" data_type: TYPE_STRING dims: [-1]}}\n{inner}'
        "instance_group {count: 1 kind: KIND_CPU}\n",
        {"model.py": TOKENIZER_MODEL},
    )
    shutil.copyfile(tokenizer, repository / "td_tokenize" / "1" / "tokenizer.json")
    inner = inner.replace("output {", "input {")
    vector = '{name: "sentence_embedding" data_type: TYPE_FP32 dims: [-1, 384]}'
    _model(
        repository,
        "td_model",
        f'backend: "onnxruntime"\ndefault_model_filename: "model.onnx"\nmax_batch_size: 0\n{inner}output {vector}\n'
        "instance_group {count: 1 kind: KIND_CPU}\n"  # its one instance has every core, as is ONNX Runtime's default
        f'parameters {{key: "intra_op_thread_count" value {{string_value: "{usable_cores()}"}}}}\n',
    )
    for file in graph.parent.iterdir():
        os.link(file, repository / "td_model" / "1" / file.name)
    outputs = "".join(f'output_map {{key: "{name}" value: "{name}"}} ' for name in _IDS)
    inputs = "".join(f'input_map {{key: "{name}" value: "{name}"}} ' for name in _IDS)
    _model(
        repository,
        "td_inference",
        f'platform: "ensemble"\nmax_batch_size: 0\ninput {{name: "TEXT" data_type: TYPE_STRING dims: [-1]}}\n'
        f'output {vector}\nensemble_scheduling {{ step [{{model_name: "td_tokenize" model_version: -1 '
        f'input_map {{key: "TEXT" value: "TEXT"}} {outputs}}}, {{model_name: "td_model" model_version: -1 {inputs}'
        'output_map {key: "sentence_embedding" value: "sentence_embedding"}}] }\n',
        {".keep": ""},
    )
    return ["td_tokenize", "td_model", "td_inference"]


def write_empty(repository: Path) -> str:
    """Write a Python model that returns the same vector for any text: a hop and nothing else."""
    _model(
        repository,
        "empty",
        'backend: "python"\nmax_batch_size: 0\ninput {name: "TEXT" data_type: TYPE_STRING dims: [-1]}\n'
        'output {name: "y" data_type: TYPE_FP32 dims: [-1, 384]}\ninstance_group {count: 1 kind: KIND_CPU}\n',
        {"model.py": EMPTY_MODEL},
    )
    return "empty"


def _model(repository: Path, name: str, config: str, files: dict[str, str] | None = None) -> None:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(f'name: "{name}"\n{config}')
    for file, content in (files or {}).items():
        (folder / file).write_text(content)
