"""The stable name of a deployed model: tokenizes, asks the graph of its version, and answers; Triton runs it.

A stock Triton has all that it needs: the serving core and its tokenizer library lie beside the versions.
https://github.com/triton-inference-server/python_backend
"""

import asyncio
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import triton_python_backend_utils as triton

#: Batches that are with the graph at once.
_MOST_AT_ONCE = 32


class TritonPythonModel:
    """One version of a model, in front of its graph."""

    def initialize(self, args):
        """Read what this version is; a damaged or missing file ends the load, and the versions before go on."""
        folder = os.path.join(args["model_repository"], args["model_version"])
        with open(os.path.join(folder, "front.json"), encoding="utf-8") as file:
            front = json.load(file)
        sys.dont_write_bytecode = True  # the repository is not the server's to write to
        sys.path.insert(0, os.path.join(args["model_repository"], front["library"]))
        from mlflow_tdeploy.core import wire
        from mlflow_tdeploy.core.desk import Ask, Desk
        from mlflow_tdeploy.core.errors import InvalidInputError
        from mlflow_tdeploy.core.open_task import open_task

        self._wire, self._ask, self._wrong_input = wire, Ask, InvalidInputError
        task = open_task(folder, front["most_rows"])
        self._graph, self._version = front["graph"], int(args["model_version"])
        self._dtypes, self._batched, self._signature = front["dtypes"], front["batched"], task.signature
        self._outputs = [one.name for one in task.signature.outputs]
        self._desk = Desk(task, self._infer, token_budget=front["token_budget"], workers=front["workers"])
        self._loop, self._pool = asyncio.new_event_loop(), ThreadPoolExecutor(_MOST_AT_ONCE)
        self._memory = triton.PreferredMemory(triton.TRITONSERVER_MEMORY_CPU, 0)

    def execute(self, requests):
        """Answer requests that came together, each with its own answer or its own error."""
        return self._loop.run_until_complete(self._answer(requests))

    def finalize(self):
        """End the threads that wait for the graph."""
        self._pool.shutdown(wait=False)
        self._loop.close()

    async def _answer(self, requests):
        asks = [self._read(request) for request in requests]
        good = [index for index, ask in enumerate(asks) if not isinstance(ask, Exception)]
        for index, answer in zip(good, await self._desk.answer([asks[index] for index in good]), strict=True):
            asks[index] = answer
        return [self._response(answer) for answer in asks]

    def _read(self, request):
        try:
            arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            return self._ask(arrays, json.loads(request.parameters() or "{}"), tuple(request.requested_output_names()))
        except Exception as error:
            return error

    def _response(self, answer):
        if isinstance(answer, Exception):
            code = (
                triton.TritonError.INVALID_ARG if isinstance(answer, self._wrong_input) else triton.TritonError.INTERNAL
            )
            return triton.InferenceResponse(error=triton.TritonError(str(answer), code))
        return triton.InferenceResponse([triton.Tensor(name, array) for name, array in answer.items()])

    async def _infer(self, feeds):
        sent = self._wire.sent(feeds, self._dtypes, batched=self._batched)
        inputs = [triton.Tensor(name, np.ascontiguousarray(array)) for name, array in sent.items()]
        request = triton.InferenceRequest(
            model_name=self._graph,
            model_version=self._version,
            requested_output_names=self._outputs,
            inputs=inputs,
            preferred_memory=self._memory,
        )
        # what request.async_exec() does, in a loop and threads that stay: making them takes as long as a short text
        response = await self._loop.run_in_executor(self._pool, request.exec)
        if response.has_error():
            raise RuntimeError(f"{self._graph}: {response.error().message()}")
        found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        return self._wire.received(found, self._signature)
