"""Models that are logged from several threads at once."""

from __future__ import annotations

import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import mlflow_tdeploy
from mlflow_tdeploy.build.exact_rules import _constants_of_no_ops
from mlflow_tdeploy.core.thread_lock import one_at_a_time
from tests.forking import forked

ROWS = np.random.default_rng(0).standard_normal((32, 3)).astype(np.float32)


class Levels(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.out(torch.log(x.abs() + 1e-9))


def process():
    """What of the process the exporters are kept from things by."""
    return (
        sys.stdout,
        sys.stderr,
        logging.root.manager.disable,
        [(one._rel_tol, one._abs_tol) for one in _constants_of_no_ops()],
        torch.Tensor.__bool__,
        torch.backends.mha.get_fastpath_enabled(),
        {name: logging.getLogger(name).level for name in ("torch", "onnx", "onnxscript")},
    )


def test_threads_log_models_one_after_the_other_and_leave_the_process_as_it_was(tmp_path):
    before, ready = process(), threading.Barrier(3, timeout=120)

    def log(place):
        module = Levels().eval()
        ready.wait()
        mlflow_tdeploy.save_model(module, tmp_path / str(place), example={"x": ROWS}, precisions=["fp32"])
        return module

    with ThreadPoolExecutor(3) as pool:
        modules = list(pool.map(log, range(3)))
    assert process() == before
    for place, module in enumerate(modules):
        model = mlflow_tdeploy.load_model(tmp_path / str(place))
        silence = np.zeros((2, 3), np.float32)
        expected = module(torch.tensor(silence)).detach().numpy()
        np.testing.assert_allclose(model.infer({"x": silence})["output_0"], expected, rtol=1e-4)


def test_a_thread_does_not_wait_for_itself():
    with one_at_a_time(), one_at_a_time():
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_waits_for_no_thread_that_it_lacks():
    held, done = threading.Event(), threading.Event()

    def hold():
        with one_at_a_time():
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def take():
        taken = threading.Thread(target=lambda: one_at_a_time().__enter__(), daemon=True)
        taken.start()
        taken.join(10)
        return int(taken.is_alive())

    try:
        assert forked(take) == 0
    finally:
        done.set()
        thread.join()
