"""An opened bundle: the object that ``mlflow.tdeploy.load_model`` returns."""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mlflow_tdeploy.core.errors import (
    InvalidInputError,
    RefusedChoiceError,
    SessionError,
    StorageError,
    TDeployError,
    shown,
)
from mlflow_tdeploy.core.pipeline import Infer, Pipeline
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.base import RUNTIMES, Session
from mlflow_tdeploy.runtime.decision import Candidate, Decision
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.runtime.select import decide_bundle
from mlflow_tdeploy.runtime.sessions import Key, Opener, Sessions, check_encoding, key_of
from mlflow_tdeploy.runtime.threads import AdaptiveThreads, Load
from mlflow_tdeploy.runtime.torch_tensors import are_tensors, stand_ins
from mlflow_tdeploy.runtime.workers import Workers
from mlflow_tdeploy.store.bundle import Bundle, Fetch

_log = logging.getLogger("mlflow_tdeploy")
#: Parameters of a call that every model has.
_CHOICE = ("variant", "runtime", "strict")


class Model:
    """A bundle served by the variant its host chose. Safe to use from several threads, and in forked processes.

    Args:
        bundle: The bundle; files of variants may be absent until ``fetch`` brought them.
        options: Session options.
        fetch: Brings a variant's files into the bundle's folder.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions, fetch: Fetch | None = None) -> None:
        self._bundle = bundle
        self._options = options
        self._renew()
        self._decision: Decision | None = None
        self._pipeline: Pipeline | None = None
        self._closed = False
        opener = Opener.of(bundle)
        self._task = opener.task
        self._sessions = Sessions(opener, options, fetch)
        _models.add(self)

    def __reduce__(self) -> Any:
        raise TypeError(
            "A loaded model holds sessions and threads of this process and cannot be pickled or copied: load it by its "
            "URI where it is needed."
        )

    def _renew(self) -> None:
        """Set up all that belongs to this process: locks, threads, and what holds them."""
        self._lock = threading.Lock()
        self._opening = threading.RLock()
        self._executor: Workers | None = None
        self._adaptive: list[AdaptiveThreads] = []
        self._load = Load()
        self._forced: dict[Policy, Pipeline] = {}
        self._pipelines: dict[Key, Pipeline] = {}

    def after_fork(self) -> None:
        """Go on in a forked process, in which no thread of this model exists.

        Such a process has to end with ``os._exit``, as those of ``multiprocessing`` do: ONNX Runtime itself, imported
        before the fork, waits for lost threads in an exit handler.
        """
        for threads in self._adaptive:
            threads.abandon()
        self._renew()
        self._sessions.after_fork()
        self._pipeline = None  # made anew by the next request

    @property
    def task(self) -> Task:
        """The model's task."""
        return self._task

    @property
    def signature(self) -> Signature:
        """Tensors and ranges of the graph."""
        return self._bundle.manifest.signature

    @property
    def variants(self) -> Mapping[str, Variant]:
        """Every variant by id."""
        return self._bundle.variants

    @property
    def bundle(self) -> Bundle:
        """The records this model was opened from."""
        return self._bundle

    @property
    def decision(self) -> Decision:
        """Which variant serves and why each other one does not."""
        if self._decision is None:
            raise SessionError("The model is not open.")
        return self._decision

    def predict(self, inputs: Any, params: Mapping[str, Any] | None = None, **keywords: Any) -> Any:
        """Answer a request.

        Args:
            inputs: Texts, or what else the task's columns say (string, list, tuples, records, array, Series, table) or,
                for ``tensors``, name → array.
            params: The task's parameters; ``variant`` and ``runtime`` force another variant for this call, ``strict``
                refuses to answer with any but the first choice.
            **keywords: More parameters, by name.

        Returns:
            What the task returns, in the order of the inputs.

        Raises:
            InvalidInputError: The inputs or parameters cannot be used.
            RefusedChoiceError: What the parameters insist on cannot serve here.
            NoVariantError: The forced variant turns out not to work.
            SessionError: The runtime failed, or the model was closed in the meantime.
        """
        if params is not None and not isinstance(params, Mapping):
            raise InvalidInputError(f"params must be a mapping from name to value, got {type(params).__name__}.")
        given = {**(params or {}), **keywords}
        policy = Policy.of({key: given.pop(key, None) for key in _CHOICE}, environ={})
        known = dict.fromkeys(param.name for param in self._task.params)
        if unknown := [key for key in given if key not in known]:
            raise InvalidInputError(
                f"Unknown parameter {shown(unknown[0])} for task '{self._task.name}'. Known: "
                f"{', '.join((*known, *_CHOICE))}."
            )
        pipeline = self._open_pipeline() if policy == Policy() else self._force(policy)
        return pipeline(inputs, given)

    def infer(self, feeds: Arrays) -> Arrays:
        """Run the graph on arrays.

        Args:
            feeds: Name → array, of the signature's dtypes and shapes; or torch tensors, then the answers are tensors
                on their device. TensorRT engines take those of their own GPU where they are; others are copied.

        Raises:
            InvalidInputError: A tensor is missing, unknown, of a wrong dtype or out of its range.
        """
        if not isinstance(feeds, Mapping):
            raise InvalidInputError(f"infer takes a mapping from name to array, got {type(feeds).__name__}.")
        if are_tensors(feeds):
            self.signature.bind(stand_ins(feeds))
            return self._load.counted(self._serving().infer_tensors)(feeds)
        self.signature.bind(feeds)
        return self._open_pipeline().single(feeds)

    def _serving(self) -> Session:
        """Return the session of the variant that serves."""
        with self._opening:
            self._open_pipeline()  # raises where the model is closed
            assert self.decision.chosen is not None
            return self._sessions.get(self.decision.chosen)

    def close(self) -> None:
        """Free sessions and threads; closing twice is fine."""
        with self._opening, self._lock:
            self._closed = True
            executor, self._executor = self._executor, None
            self._pipeline, self._forced, self._pipelines = None, {}, {}
            adaptive, self._adaptive = self._adaptive, []
        if executor is not None:
            executor.shutdown(wait=True)
        for threads in adaptive:
            threads.close()
        self._sessions.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, policy: Policy) -> None:
        """Choose and open a variant; called once by :func:`open_model`.

        Raises:
            NoVariantError: None can serve.
            IntegrityError: A file of the task, such as the tokenizer, cannot be read, or makes other arrays of texts
                than where the model was logged.
        """
        self._task.prepare()
        check_encoding(self._task, self._sessions.opener.golden)
        decision = self._decide(policy)
        for failure in decision.failures:
            _log.warning("A variant that is, or may be, better cannot serve on this host: %s", failure)
        self._decision, self._pipeline = self._open_first(decision)
        chosen = self._decision.chosen
        if chosen is not None:
            _log.info("Serving variant %s on %s.", chosen.variant, chosen.runtime)

    def _open_first(self, decision: Decision) -> tuple[Decision, Pipeline]:
        """Open the best candidate that works; under ``strict`` the first one or none.

        Raises:
            NoVariantError: None does.
            StorageError: There is no room on this host for the last one to be tried.
        """
        failed: Exception | None = None
        while (candidate := next(iter(decision.openable), None)) is not None:
            try:
                return decision, self._pipeline_of(candidate)
            except Exception as error:  # also what a store or a library raises: the next variant may be fine
                if self._closed:
                    raise
                why = str(error) if isinstance(error, TDeployError) else f"{type(error).__name__}: {error}"
                decision, failed = decision.failed(candidate, why), error
                _log.warning("Variant %s cannot serve: %s", candidate.variant, why)
        if isinstance(failed, StorageError):  # that says more: where there is no room, and how to make some
            raise failed
        raise decision.none_left() from failed

    def _decide(self, policy: Policy) -> Decision:
        return decide_bundle(self._bundle, probe.hardware(), policy)

    def _pipeline_of(self, candidate: Candidate) -> Pipeline:
        """Return the pipeline of a variant on a runtime: one, however many policies lead there."""
        with self._opening:  # one at a time: two first requests must not open one variant twice
            if self._closed:
                raise SessionError("The model is closed.")
            if key_of(candidate) not in self._pipelines:
                session = self._sessions.get(candidate)
                self._pipelines[key_of(candidate)] = self._make_pipeline(candidate, session)
            return self._pipelines[key_of(candidate)]

    def _make_pipeline(self, candidate: Candidate, session: Session) -> Pipeline:
        cores = probe.hardware().cores
        bulk = RUNTIMES.get(candidate.runtime)().bulk(self._bundle.variants[candidate.variant], self._options, cores)
        with self._lock:
            if bulk.workers > 1 and self._executor is None:
                self._executor = Workers(max(bulk.workers, cores), thread_name_prefix="tdeploy")
        return Pipeline(
            self._task,
            self._load.counted(session.infer),
            single=self._single(candidate, session),
            token_budget=bulk.token_budget,
            executor=self._executor if bulk.workers > 1 else None,
            workers=bulk.workers,
        )

    def _single(self, candidate: Candidate, session: Session) -> Infer:
        """Return how a lone batch runs: on as many threads as pay, unless the user said how many."""
        options = RUNTIMES.get(candidate.runtime)().lone_options(self._options, probe.hardware().cores)
        if options is None:
            return self._load.counted(session.infer)
        # without a reference to this model, which would otherwise live until the garbage is collected
        open_wide = functools.partial(self._sessions.opener.open, candidate, options)
        adaptive = AdaptiveThreads(session.infer, open_wide, self._load)
        with self._lock:
            self._adaptive.append(adaptive)
        return adaptive

    def _open_pipeline(self) -> Pipeline:
        pipeline, decision = self._pipeline, self._decision
        if pipeline is not None:
            return pipeline
        if self._closed or decision is None or decision.chosen is None:
            raise SessionError("The model is closed." if self._closed else "The model is not open.")
        self._pipeline = self._pipeline_of(decision.chosen)  # after a fork
        return self._pipeline

    def _force(self, policy: Policy) -> Pipeline:
        """Return the pipeline of what one call insists on; opened by the first such call.

        What the model was opened with still holds where the call says nothing else.
        """
        serving, own = self._open_pipeline(), self.decision.policy
        origins = {key: origin for key, origin in own.origins.items() if not getattr(policy, key)}
        policy = Policy(
            policy.variant or own.variant, policy.runtime or own.runtime, policy.strict or own.strict, origins
        )
        if (known := self._forced.get(policy)) is not None:  # nobody waits for another variant that is being opened
            return known
        decision = self._decide(policy)
        if decision.chosen is None:
            raise decision.none_left(RefusedChoiceError)
        if self.decision.chosen is not None and key_of(decision.chosen) == key_of(self.decision.chosen):
            pipeline = serving
        else:
            opened, pipeline = self._open_first(decision)
            if opened.failures != decision.failures:
                return pipeline  # not for good: the better one may work the next time
        self._forced[policy] = pipeline
        return pipeline


#: Every model of this process, so that those of a forked one can be told.
_models: weakref.WeakSet[Model] = weakref.WeakSet()


def _after_fork() -> None:
    for model in list(_models):
        model.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def open_model(
    path: Path | str, *, policy: Policy | None = None, options: SessionOptions | None = None, fetch: Fetch | None = None
) -> Model:
    """Open a bundle on this host.

    Args:
        path: The MLflow model directory or its ``tdeploy`` folder.
        policy: What the user insists on; read from the environment when None.
        options: Session options.
        fetch: Brings a variant's files where the bundle was downloaded without them.

    Raises:
        NotFoundError: There is no bundle.
        IntegrityError: A file was changed.
        NoVariantError: No variant can serve; the message says why for each.
    """
    model = Model(Bundle.open(path), options or SessionOptions(), fetch)
    try:
        model.open(policy if policy is not None else Policy.of())
    except BaseException:
        model.close()
        raise
    return model
