"""Counts what is seen of a version that is tried out, for all processes of the one that serves.

Told of a request, or of nothing, it answers with what it has counted so far.
https://github.com/triton-inference-server/python_backend
"""

import collections
import json
import sys

import numpy as np
import triton_python_backend_utils as triton

#: Requests whose times are kept, the newest ones.
_TIMES = 10000


class TritonPythonModel:
    """One process, so that everything is counted in one place."""

    def initialize(self, args):
        """Begin at nothing."""
        sys.dont_write_bytecode = True  # the repository is not the server's to write to
        self._requests, self._failed, self._alike, self._why, self._stopped = 0, 0, 0, "", False
        self._before, self._after = (collections.deque(maxlen=_TIMES) for _ in range(2))

    def execute(self, requests):
        """Count, and say."""
        for request in requests:
            for one in triton.get_input_tensor_by_name(request, "seen").as_numpy().reshape(-1):
                if one:
                    self._add(json.loads(one))
        said = np.array([json.dumps(self._said()).encode()], dtype=np.object_)
        return [triton.InferenceResponse([triton.Tensor("tally", said)]) for _ in requests]

    def _add(self, sample):
        self._requests += 1
        if sample["failed"]:
            self._failed, self._why = self._failed + 1, sample["failed"]
            self._stopped |= sample.get("stopped", False)  # a front of an older version does not say
            return
        self._alike += sample["alike"]
        self._before.append(sample["before"])
        self._after.append(sample["after"])

    def _said(self):
        before, after = (float(np.percentile(one, 95)) if one else 0.0 for one in (self._before, self._after))
        return {
            "requests": self._requests,
            "failed": self._failed,
            "stopped": self._stopped,
            "alike": self._alike,
            "before": before,
            "after": after,
            "why": self._why,
        }
