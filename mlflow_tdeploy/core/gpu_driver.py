"""The first GPU as the CUDA driver describes it. Only Python is needed: a child process or a Triton server runs this.

https://docs.nvidia.com/cuda/cuda-driver-api
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import uuid
from pathlib import Path
from typing import Any

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_DRIVER = Path("/proc/driver/nvidia/version")


def first_gpu() -> dict[str, Any]:
    """Return the fields of a :class:`~mlflow_tdeploy.core.hardware.Gpu`. A broken driver may end the process.

    Raises:
        OSError: There is no driver.
        RuntimeError: It has no device that can be used.
    """
    cuda, device = _first()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, 256, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    major, minor = (_number(cuda.cuDeviceGetAttribute, attribute, device) for attribute in (_MAJOR, _MINOR))
    latest = _number(cuda.cuDriverGetVersion)
    return {
        "name": name.value.decode(),
        "compute_capability": f"{major}.{minor}",
        "memory": memory.value,
        "driver": _driver(),
        "cuda": f"{latest // 1000}.{latest % 1000 // 10}",
    }


def uuid_of_first() -> str:
    """Return the UUID of that GPU, or of the part of one (MIG) that it is. A broken driver may end the process.

    Raises:
        OSError: There is no driver.
        RuntimeError: It has no device that can be used.
    """
    (cuda, device), found = _first(), (ctypes.c_ubyte * 16)()
    # the second version (CUDA 11.4) tells a part's own
    if error := getattr(cuda, "cuDeviceGetUuid_v2", cuda.cuDeviceGetUuid)(found, device):
        raise RuntimeError(f"CUDA driver error {error}")
    return str(uuid.UUID(bytes=bytes(found)))


def _first() -> tuple[Any, ctypes.c_int]:
    cuda = ctypes.CDLL("libcuda.so.1")
    if cuda.cuInit(0):
        raise RuntimeError("cuInit failed: no usable driver or device")
    if not _number(cuda.cuDeviceGetCount):
        raise RuntimeError("no CUDA device")
    return cuda, ctypes.c_int(_number(cuda.cuDeviceGet, 0))


def _number(call: Any, *arguments: Any) -> int:
    value = ctypes.c_int()
    if error := call(ctypes.byref(value), *arguments):
        raise RuntimeError(f"CUDA driver error {error}")
    return value.value


def _driver() -> str:
    try:
        said = re.search(r" ([0-9]{3}[.][0-9.]+) ", _DRIVER.read_text())
    except OSError:
        return ""
    return said[1] if said else ""


if __name__ == "__main__":
    try:
        print(uuid_of_first() if "uuid" in sys.argv[1:] else json.dumps(first_gpu()))  # noqa: T201 - a child says it
    except (OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from error
