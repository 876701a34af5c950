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
#: The parameter with which one version asks another: a model cannot be sent numbers that are not whole.
_PARAMS = "tdeploy.params"


class TritonPythonModel:
    """One version of a model, in front of its graph."""

    def initialize(self, args):
        """Read what this version is; a damaged or missing file ends the load, and the versions before go on."""
        folder = os.path.join(args["model_repository"], args["model_version"])
        with open(os.path.join(folder, "front.json"), encoding="utf-8") as file:
            front = json.load(file)
        sys.dont_write_bytecode = True  # the repository is not the server's to write to
        library = os.path.join(args["model_repository"], front["library"])
        sys.path.insert(0, library)
        sys.path.append(
            os.path.join(library, "pillow")
        )  # the last: the server's own, where it has one, is for its Python
        from mlflow_tdeploy.core import wire
        from mlflow_tdeploy.core.desk import Ask, Desk
        from mlflow_tdeploy.core.errors import InvalidInputError
        from mlflow_tdeploy.core.open_task import open_task
        from mlflow_tdeploy.core.rollout import Beside, Rollout

        self._wire, self._ask, self._wrong_input = wire, Ask, InvalidInputError
        task = open_task(folder, front["most_rows"])
        self._graph, self._version = front["graph"], int(args["model_version"])
        self._dtypes, self._batched, self._signature = front["dtypes"], front["batched"], task.signature
        self._outputs = [one.name for one in task.signature.outputs]
        self._desk = Desk(task, self._infer, token_budget=front["token_budget"], workers=front["workers"])
        self._loop, self._pool = asyncio.new_event_loop(), ThreadPoolExecutor(_MOST_AT_ONCE)
        self._memory = triton.PreferredMemory(triton.TRITONSERVER_MEMORY_CPU, 0)
        said = json.loads(args["model_config"])["parameters"].get("tdeploy.rollout")
        rollout = Rollout(**json.loads(said["string_value"])) if said else None
        self._beside = Beside(rollout, self._other, self._tell) if rollout else None

    def execute(self, requests):
        """Answer requests that came together, each with its own answer or its own error."""
        return self._loop.run_until_complete(self._answer(requests))

    def finalize(self):
        """End the threads that wait for the graph."""
        if self._beside:
            self._beside.close()
        self._pool.shutdown(wait=False)
        self._loop.close()

    async def _answer(self, requests):
        asks = [self._read(request) for request in requests]
        good = [index for index, ask in enumerate(asks) if not isinstance(ask, Exception)]
        own = [asks[index] for index in good]
        answers = self._desk.answer(own)
        answers = self._beside.answers(own, answers) if self._beside else answers
        for index, answer in zip(good, await answers, strict=True):
            asks[index] = answer
        return [self._response(answer) for answer in asks]

    def _read(self, request):
        try:
            arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            params = json.loads(request.parameters() or "{}")
            params = json.loads(params[_PARAMS]) if _PARAMS in params else params
            return self._ask(arrays, params, tuple(request.requested_output_names()))
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
        request = self._request(self._graph, self._version, sent, self._outputs)
        # what request.async_exec() does, in a loop and threads that stay: making them takes as long as a short text
        response = await self._loop.run_in_executor(self._pool, request.exec)
        return self._wire.received(self._arrays(self._graph, response), self._signature)

    def _request(self, model, version, arrays, outputs, **more):
        return triton.InferenceRequest(
            model_name=model,
            model_version=version,
            requested_output_names=list(outputs),
            inputs=[triton.Tensor(name, np.ascontiguousarray(array)) for name, array in arrays.items()],
            preferred_memory=self._memory,
            **more,
        )

    def _arrays(self, model, response):
        if response.has_error():
            raise RuntimeError(f"{model}: {response.error().message()}")
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def _other(self, model, ask):
        """Have the version that is tried out answer a request."""
        request = self._request(model, -1, ask.arrays, ask.outputs, parameters={_PARAMS: json.dumps(ask.params)})
        return self._arrays(model, request.exec())

    def _tell(self, model, seen):
        """Have it counted."""
        array = np.array([seen.encode()], dtype=np.object_)
        self._arrays(model, self._request(model, -1, {"seen": array}, ["tally"]).exec())
