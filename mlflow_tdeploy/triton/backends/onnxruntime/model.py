"""A Python-based backend that opens ONNX graphs for a Triton that comes without its own ONNX Runtime backend.

It is for trying repositories out where only the wheel of Triton is to be had; its speed says nothing about NVIDIA's
backend. Triton runs it in a process of its own.
https://github.com/triton-inference-server/backend/blob/main/docs/python_based_backends.md
"""

import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """One model: a session for all of its instances' requests, batched as Triton hands them over."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Take the configuration as it is written."""
        return auto_complete_model_config

    def initialize(self, args):
        """Open the graph on as many threads as ``intra_op_thread_count`` says, one by default."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 1))
        options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 0))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # with the meaning that it has for NVIDIA's backend; without one everything is optimized
        level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
        options.graph_optimization_level = {
            -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
            2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        }.get(level, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
        name = config.get("default_model_filename") or "model.onnx"
        path = os.path.join(args["model_repository"], args["model_version"], name)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = [node["name"] for node in config["input"]]
        self._outputs = [node["name"] for node in config["output"]]
        for kind, named, has in (
            ("input", self._inputs, [one.name for one in self._session.get_inputs()]),
            ("output", self._outputs, [one.name for one in self._session.get_outputs()]),
        ):
            if unknown := sorted(set(named) - set(has)):
                raise RuntimeError(f"the graph has no {kind} '{unknown[0]}'; it has: {', '.join(has)}")
        self._batches = config.get("max_batch_size", 0) > 0

    def execute(self, requests):
        """Answer requests, those of one shape in one run; one that fails gets its own error."""
        feeds = [self._feeds(request) for request in requests]
        answers = [None] * len(requests)
        for indices in self._alike(feeds):
            try:
                self._run(feeds, indices, answers)
            except Exception:  # one of them is wrong: only that one shall fail
                for index in indices:
                    self._run_alone(feeds[index], index, answers)
        return answers

    def _feeds(self, request):
        tensors = {name: triton.get_input_tensor_by_name(request, name) for name in self._inputs}
        return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}

    def _alike(self, feeds):
        groups = {}
        for index, arrays in enumerate(feeds):
            key = tuple(array.shape[1:] for array in arrays.values()) if self._batches else index
            groups.setdefault(key, []).append(index)
        return groups.values()

    def _run(self, feeds, indices, answers):
        first = feeds[indices[0]]
        together = first
        if len(indices) > 1:
            together = {name: np.concatenate([feeds[index][name] for index in indices]) for name in first}
        outputs = self._session.run(self._outputs, together)
        begin = 0
        for index in indices:
            end = begin + (len(next(iter(feeds[index].values()))) if len(indices) > 1 else 0)
            part = [output[begin:end] if len(indices) > 1 else output for output in outputs]
            tensors = [triton.Tensor(name, array) for name, array in zip(self._outputs, part, strict=True)]
            answers[index] = triton.InferenceResponse(tensors)
            begin = end

    def _run_alone(self, feeds, index, answers):
        try:
            self._run([feeds], [0], single := [None])
            answers[index] = single[0]
        except Exception as error:
            answers[index] = triton.InferenceResponse(error=triton.TritonError(str(error)))
