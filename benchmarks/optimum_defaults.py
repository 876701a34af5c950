"""optimum-onnx's dynamic int8 with its defaults, made in an environment of its own: its pins are not ours.

This file is also the program that runs there: ``python optimum_defaults.py MODEL OUT``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_ENVIRONMENT = Path(__file__).parents[1] / ".tmp" / "optimum"
_PACKAGES = ("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0")
_GRAPH = "model_quantized.onnx"


def make(folder: Path) -> Path | None:
    """Make the graph of the benchmark's model; None where its environment cannot be made here.

    Args:
        folder: A new folder for it.
    """
    from benchmarks.peers import MODEL
    from benchmarks.report import say

    python = _ENVIRONMENT / "bin" / "python"
    try:
        if not (_ENVIRONMENT / "made").exists():
            subprocess.run([sys.executable, "-m", "venv", str(_ENVIRONMENT)], check=True, capture_output=True)
            subprocess.run(
                [str(python), "-m", "pip", "install", "--quiet", *_PACKAGES], check=True, capture_output=True
            )
            (_ENVIRONMENT / "made").touch()
        subprocess.run([str(python), __file__, str(MODEL), str(folder)], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        say(f"  left out: {str(error.stderr).strip().splitlines()[-1:]}")
        return None
    return folder / _GRAPH


def main(model: str, out: str) -> None:
    """Export a model and quantize it as optimum's documentation does for processors with VNNI."""
    from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    ORTModelForFeatureExtraction.from_pretrained(model, export=True).save_pretrained(out)
    quantizer = ORTQuantizer.from_pretrained(out, file_name="model.onnx")
    quantizer.quantize(save_dir=out, quantization_config=AutoQuantizationConfig.avx512_vnni(is_static=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
