"""Says what the host of a Triton server is; loaded for one request, before a version is chosen for that server.

https://github.com/triton-inference-server/python_backend
"""

import dataclasses
import json
import os
import platform
import re
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as triton

_LIBRARIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/local/tensorrt/lib", "/usr/lib64")


class TritonPythonModel:
    """Answers every request with the same JSON: the fields of a fingerprint."""

    def initialize(self, args):
        """Ask the host; what lies beside this file is this package's own code for that."""
        sys.dont_write_bytecode = True  # the repository is not the server's to write to
        sys.path.insert(0, os.path.join(args["model_repository"], args["model_version"]))
        import gpu_driver
        import hardware

        host = dataclasses.asdict(hardware.host_cpu())
        try:
            host["gpu"] = gpu_driver.first_gpu()
        except (OSError, RuntimeError):
            del host["gpu"]  # no driver, or no device for this server
        host["software"] = {"python": platform.python_version(), **_tensorrt()}
        self._answer = np.array([json.dumps(host).encode()], dtype=np.object_)

    def execute(self, requests):
        """Answer."""
        return [triton.InferenceResponse([triton.Tensor("host", self._answer)]) for _ in requests]


def _tensorrt():
    """Return the version of TensorRT as NVIDIA's image names it, else as its library's file is called."""
    if said := re.match(r"[0-9]+(?:\.[0-9]+)+", os.environ.get("TRT_VERSION", "")):
        return {"tensorrt": said[0]}
    for folder in _LIBRARIES:
        names = (
            re.fullmatch(r"libnvinfer\.so\.([0-9]+)\.([0-9]+)\.([0-9]+)", one.name) for one in Path(folder).glob("*")
        )
        if found := [tuple(map(int, name.groups())) for name in names if name]:
            return {"tensorrt": ".".join(map(str, max(found)))}
    return {}
