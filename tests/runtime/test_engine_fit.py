"""Every pairing of an engine and a host, as NVIDIA documents them."""

from __future__ import annotations

import dataclasses

import pytest

from mlflow_tdeploy.core.engine import EngineRecord
from mlflow_tdeploy.core.hardware import Gpu
from mlflow_tdeploy.runtime.base import Fit
from mlflow_tdeploy.runtime.engine_fit import EngineHost, engine_fit

A10, A40, L4 = Gpu("NVIDIA A10", "8.6", cuda="12.8"), Gpu("NVIDIA A40", "8.6", cuda="12.8"), Gpu("NVIDIA L4", "8.9")
T4, H200, B5090 = Gpu("Tesla T4", "7.5"), Gpu("NVIDIA H200", "9.0"), Gpu("NVIDIA GeForce RTX 5090", "12.0")
PLAN = EngineRecord("tensorrt", "10.16.1.11", "linux-x86_64", "NVIDIA A10", "8.6", "570.86.10", "12.9")
RTX = EngineRecord("tensorrt_rtx", "1.7.1.116", "linux-x86_64", cuda="12.9")
HOST = EngineHost("linux-x86_64", A10, "tensorrt", "10.16.1.11")
RTX_HOST = EngineHost("linux-x86_64", A10, "tensorrt_rtx", "1.7.1.116")
COMPATIBLE = {"flags": ("VERSION_COMPATIBLE",)}
AMPERE, SAME = ({"hardware_compatibility": level} for level in ("AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"))

CASES = [
    # TensorRT: GPUs
    ("the same GPU", PLAN, {}, HOST, {}, Fit.OPTIMAL, "this kind of GPU, NVIDIA A10"),
    ("another GPU of the same capability", PLAN, {}, HOST, {"gpu": A40}, Fit.USABLE, "another GPU of the same"),
    ("a newer GPU", PLAN, {}, HOST, {"gpu": L4}, Fit.REBUILD, "this GPU has compute capability 8.9"),
    ("an older GPU", PLAN, {}, HOST, {"gpu": T4}, Fit.REBUILD, "this GPU has compute capability 7.5"),
    ("no GPU", PLAN, {}, HOST, {"gpu": None}, Fit.UNSUPPORTED, "no NVIDIA GPU"),
    ("an unknown GPU of origin", PLAN, {"gpu": "", "compute_capability": ""}, HOST, {}, Fit.USABLE, "not known which"),
    ("Ampere and later on a newer GPU", PLAN, AMPERE, HOST, {"gpu": L4}, Fit.USABLE, "any GPU from compute"),
    ("Ampere and later on Hopper", PLAN, AMPERE, HOST, {"gpu": H200}, Fit.USABLE, "any GPU from compute"),
    ("Ampere and later on Turing", PLAN, AMPERE, HOST, {"gpu": T4}, Fit.REBUILD, "this GPU has compute capability 7.5"),
    ("Ampere and later where it was built", PLAN, AMPERE, HOST, {}, Fit.OPTIMAL, "this kind of GPU"),
    (
        "same capability, another GPU",
        PLAN,
        SAME,
        HOST,
        {"gpu": A40},
        Fit.OPTIMAL,
        "every GPU of compute",
    ),
    ("same capability, a newer GPU", PLAN, SAME, HOST, {"gpu": L4}, Fit.REBUILD, "capability 8.9"),
    # TensorRT: versions
    ("a later build", PLAN, {}, HOST, {"version": "10.16.1.12"}, Fit.REBUILD, "this host has 10.16.1.12"),
    ("all but the build is known", PLAN, {}, HOST, {"version": "10.16.1"}, Fit.OPTIMAL, "this kind"),
    ("another patch, the build is not known", PLAN, {}, HOST, {"version": "10.16.11"}, Fit.REBUILD, "has 10.16.11"),
    ("an unknown version", PLAN, {}, HOST, {"version": ""}, Fit.UNSUPPORTED, "this host's is not known"),
    ("an earlier version", PLAN, {}, HOST, {"version": "10.9.0.34"}, Fit.REBUILD, "this host has 10.9.0.34"),
    ("compatible, a later minor version", PLAN, COMPATIBLE, HOST, {"version": "10.17.0.1"}, Fit.OPTIMAL, "this kind"),
    ("compatible, the next major version", PLAN, COMPATIBLE, HOST, {"version": "11.4.0.106"}, Fit.OPTIMAL, "this kind"),
    ("compatible, an earlier version", PLAN, COMPATIBLE, HOST, {"version": "10.9.0.34"}, Fit.REBUILD, "does not reach"),
    ("compatible, two major versions on", PLAN, COMPATIBLE, HOST, {"version": "12.0.0.1"}, Fit.REBUILD, "not reach"),
    (
        *("compatible, from 8 to 11", PLAN, {**COMPATIBLE, "version": "8.6.1.6"}, HOST, {"version": "11.4.0.106"}),
        *(Fit.REBUILD, "does not reach"),
    ),
    (
        *("compatible, from 8 to 10", PLAN, {**COMPATIBLE, "version": "8.6.1.6"}, HOST, {}),
        *(Fit.OPTIMAL, "this kind of GPU"),
    ),
    ("compatible, a newer GPU", PLAN, COMPATIBLE, HOST, {"gpu": L4, "version": "10.17.0.1"}, Fit.REBUILD, "8.9"),
    # platforms, modules, drivers
    ("Windows", PLAN, {}, HOST, {"os": "windows-amd64"}, Fit.REBUILD, "this host is windows-amd64"),
    ("Arm", PLAN, {}, HOST, {"os": "linux-aarch64"}, Fit.REBUILD, "this host is linux-aarch64"),
    ("unknown origin", PLAN, {"os": ""}, HOST, {}, Fit.OPTIMAL, "this kind of GPU"),
    ("TensorRT for TensorRT-RTX", PLAN, {}, RTX_HOST, {}, Fit.UNSUPPORTED, "built by tensorrt, which tensorrt_rtx"),
    ("TensorRT-RTX for TensorRT", RTX, {}, HOST, {}, Fit.UNSUPPORTED, "built by tensorrt_rtx, which tensorrt does"),
    (
        "an old driver",
        PLAN,
        {"cuda": "13.0"},
        HOST,
        {},
        Fit.UNSUPPORTED,
        "driver for CUDA 13.0, this one",
    ),
    ("a minor version behind", PLAN, {"cuda": "12.9"}, HOST, {}, Fit.OPTIMAL, "this kind of GPU"),
    # TensorRT-RTX
    ("RTX on Ampere", RTX, {}, RTX_HOST, {}, Fit.OPTIMAL, "compiled for this GPU"),
    ("RTX on Ada", RTX, {}, RTX_HOST, {"gpu": L4}, Fit.OPTIMAL, "compiled for this GPU"),
    ("RTX on Blackwell", RTX, {}, RTX_HOST, {"gpu": B5090}, Fit.OPTIMAL, "compiled for this GPU"),
    ("RTX on Turing", RTX, {}, RTX_HOST, {"gpu": T4}, Fit.REBUILD, "this GPU has 7.5"),
    ("RTX on Hopper", RTX, {}, RTX_HOST, {"gpu": H200}, Fit.USABLE, "does not list compute capability 9.0"),
    ("RTX for Turing on Turing", RTX, {"targets": ("7.5",)}, RTX_HOST, {"gpu": T4}, Fit.OPTIMAL, "compiled for this"),
    ("RTX for Turing on Ampere", RTX, {"targets": ("7.5",)}, RTX_HOST, {}, Fit.REBUILD, "capability 7.5, this GPU"),
    ("RTX for Turing on Blackwell", RTX, {"targets": ("7.5",)}, RTX_HOST, {"gpu": B5090}, Fit.REBUILD, "has 12.0"),
    ("another RTX release", RTX, COMPATIBLE, RTX_HOST, {"version": "1.8.0.1"}, Fit.REBUILD, "this host has 1.8.0.1"),
    ("RTX from Windows", RTX, {"os": "windows-x86_64"}, RTX_HOST, {}, Fit.OPTIMAL, "compiled for this GPU"),
    ("RTX without a GPU", RTX, {}, RTX_HOST, {"gpu": None}, Fit.UNSUPPORTED, "no NVIDIA GPU"),
]


@pytest.mark.parametrize(
    ("engine", "built", "host", "there", "fit", "why"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_engine_fit(engine, built, host, there, fit, why):
    compat = engine_fit(dataclasses.replace(engine, **built), dataclasses.replace(host, **there))
    assert compat.fit is fit, compat.reason
    assert why in compat.reason
