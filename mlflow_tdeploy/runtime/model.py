"""An opened bundle: the object that ``mlflow.tdeploy.load_model`` returns."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from mlflow_tdeploy.core.batching import DEFAULT_TOKEN_BUDGET
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.compare import same_outputs
from mlflow_tdeploy.core.errors import (
    IntegrityError,
    InvalidInputError,
    NoVariantError,
    RefusedChoiceError,
    SessionError,
    TDeployError,
)
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.core.pipeline import Infer, Pipeline
from mlflow_tdeploy.core.tasks import TASKS, Task
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.base import RUNTIMES, Session
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.runtime.select import Candidate, Decision, Policy, decide_bundle
from mlflow_tdeploy.runtime.threads import AdaptiveThreads, Load
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.hashing import HashCache
from mlflow_tdeploy.store.layout import ASSETS

_log = logging.getLogger("mlflow_tdeploy")

Fetch = Callable[[Variant], None]
P = ParamSpec("P")
T = TypeVar("T")


class _Workers(ThreadPoolExecutor):
    """Threads for batches; work that comes after the end is refused as by anything else of a closed model."""

    closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as error:  # also raised where no thread can be started
            if self.closed:
                raise SessionError("The model is closed.") from error
            raise

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.closed = True
        super().shutdown(wait, cancel_futures=cancel_futures)


class Model:
    """A bundle served by the variant its host chose. Safe to use from several threads.

    Args:
        bundle: The bundle; files of variants may be absent until ``fetch`` brought them.
        options: Session options.
        fetch: Brings a variant's files into the bundle's folder.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions, fetch: Fetch | None = None) -> None:
        self._bundle = bundle
        self._options = options
        self._fetch = fetch
        self._lock = threading.Lock()
        self._opening = threading.RLock()
        self._executor: _Workers | None = None
        self._sessions: dict[tuple[str, str], Session] = {}
        self._adaptive: list[AdaptiveThreads] = []
        self._load = Load()
        self._forced: dict[Policy, Pipeline] = {}
        self._others: dict[tuple[str, str], Pipeline] = {}
        self._decision: Decision | None = None
        self._pipeline: Pipeline | None = None
        self._closed = False
        hashes = HashCache()
        bundle.verify_assets(hashes)
        manifest = bundle.manifest
        self._task = TASKS.get(manifest.task)(manifest.task_config, manifest.signature, bundle.root / ASSETS)
        self._opener = _Opener(bundle, self._task, bundle.golden(), hashes)

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
            inputs: Texts (string, list, array, Series, one-column table) or, for ``tensors``, name → array.
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
        policy = Policy.of({key: given.pop(key, None) for key in ("variant", "runtime", "strict")}, environ={})
        pipeline = self._open_pipeline() if policy == Policy() else self._force(policy)
        return pipeline(inputs, given)

    def infer(self, feeds: Arrays) -> Arrays:
        """Run the graph on arrays.

        Args:
            feeds: Name → array, of the signature's dtypes and shapes.

        Raises:
            InvalidInputError: A tensor is missing, unknown, of a wrong dtype or out of its range.
        """
        if not isinstance(feeds, Mapping):
            raise InvalidInputError(f"infer takes a mapping from name to array, got {type(feeds).__name__}.")
        self.signature.bind(feeds)
        return self._open_pipeline().single(feeds)

    def close(self) -> None:
        """Free sessions and threads; closing twice is fine."""
        with self._opening, self._lock:
            self._closed = True
            sessions, self._sessions = list(self._sessions.values()), {}
            executor, self._executor = self._executor, None
            self._pipeline, self._forced, self._others = None, {}, {}
            adaptive, self._adaptive = self._adaptive, []
        if executor is not None:
            executor.shutdown(wait=True)
        for threads in adaptive:
            threads.close()
        for session in sessions:
            session.close()

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
            IntegrityError: A file of the task, such as the tokenizer, cannot be read.
        """
        self._task.prepare()
        decision = self._decide(policy)
        for failure in decision.failures:
            _log.warning("A better variant cannot serve on this host: %s", failure)
        while (candidate := next(iter(decision.openable), None)) is not None:
            try:
                session = self._open_session(candidate)
            except Exception as error:  # also what a store or a library raises: the next variant may be fine
                why = str(error) if isinstance(error, TDeployError) else f"{type(error).__name__}: {error}"
                decision = decision.failed(candidate, why)
                _log.warning("Variant %s cannot serve: %s", candidate.variant, why)
                if policy.strict:
                    raise decision.none_left() from error
                continue
            self._decision = decision
            self._pipeline = self._make_pipeline(candidate, session)
            _log.info("Serving variant %s on %s.", candidate.variant, candidate.runtime)
            return
        raise decision.none_left()

    def _decide(self, policy: Policy) -> Decision:
        return decide_bundle(self._bundle, probe.hardware(), policy)

    def _open_session(self, candidate: Candidate) -> Session:
        key = (candidate.variant, candidate.runtime)
        with self._opening:  # one at a time: two first requests must not open one variant twice
            if self._closed:
                raise SessionError("The model is closed.")
            if key not in self._sessions:
                self._bring(self._bundle.variants[candidate.variant])
                self._sessions[key] = self._opener.open(candidate, self._options)
            return self._sessions[key]

    def _bring(self, variant: Variant) -> None:
        """Have the variant's files here, whole; a damaged copy of a remote file is fetched once more."""
        if self._fetch is None:
            return
        if not self._bundle.present(variant):
            self._fetch(variant)
        try:
            self._bundle.verify(variant, self._opener.hashes)
        except IntegrityError as error:
            _log.warning("Fetching variant %s again: %s", variant.id, error)
            self._fetch(variant)

    def _make_pipeline(self, candidate: Candidate, session: Session) -> Pipeline:
        workers = self._options.threads or probe.hardware().cores
        with self._lock:
            if workers > 1 and self._executor is None:
                self._executor = _Workers(workers, thread_name_prefix="tdeploy")
        hint = self._bundle.variants[candidate.variant].token_budget
        budget = self._options.token_budget or hint or DEFAULT_TOKEN_BUDGET
        return Pipeline(
            self._task,
            self._load.counted(session.infer),
            single=self._single(candidate, session),
            token_budget=budget,
            executor=self._executor,
            workers=workers,
        )

    def _single(self, candidate: Candidate, session: Session) -> Infer:
        """Return how a lone batch runs: on as many threads as pay, unless the user said how many."""
        options = RUNTIMES.get(candidate.runtime)().lone_options(self._options, probe.hardware().cores)
        if options is None:
            return self._load.counted(session.infer)
        # without a reference to this model, which would otherwise live until the garbage is collected
        open_wide = functools.partial(self._opener.open, candidate, options)
        adaptive = AdaptiveThreads(session.infer, open_wide, self._load)
        with self._lock:
            self._adaptive.append(adaptive)
        return adaptive

    def _open_pipeline(self) -> Pipeline:
        pipeline = self._pipeline
        if pipeline is None:
            raise SessionError("The model is closed." if self._closed else "The model is not open.")
        return pipeline

    def _force(self, policy: Policy) -> Pipeline:
        """Return the pipeline of what one call insists on; opened by the first such call.

        What the model was opened with still holds where the call says nothing else.
        """
        own = self.decision.policy
        origins = {key: origin for key, origin in own.origins.items() if not getattr(policy, key)}
        policy = Policy(
            policy.variant or own.variant, policy.runtime or own.runtime, policy.strict or own.strict, origins
        )
        with self._opening:
            serving = self._open_pipeline()
            if policy not in self._forced:
                decision = self._decide(policy)
                chosen, current = decision.chosen, self.decision.chosen
                if chosen is None:
                    raise decision.none_left(RefusedChoiceError)
                same = current is not None and _key(chosen) == _key(current)
                self._forced[policy] = serving if same else self._pipeline_of(chosen)
            return self._forced[policy]

    def _pipeline_of(self, candidate: Candidate) -> Pipeline:
        """Return the pipeline of a variant that some call forces: one, however it is named."""
        if _key(candidate) not in self._others:
            try:
                session = self._open_session(candidate)
            except TDeployError as error:
                raise NoVariantError(f"Variant '{candidate.variant}' cannot serve: {error}") from error
            self._others[_key(candidate)] = self._make_pipeline(candidate, session)
        return self._others[_key(candidate)]


@dataclass(frozen=True)
class _Opener:
    """Opens sessions that answer as they must: files unchanged, a golden request within the budget."""

    bundle: Bundle
    task: Task
    golden: tuple[GoldenRequest, ...]
    hashes: HashCache

    def open(self, candidate: Candidate, options: SessionOptions) -> Session:
        """Return an opened session of a variant whose files are here.

        Raises:
            IntegrityError: A file was changed.
            SessionError: It cannot be opened or answers wrongly.
        """
        variant = self.bundle.variants[candidate.variant]
        self.bundle.verify(variant, self.hashes)
        runtime = RUNTIMES.get(candidate.runtime)()
        session = runtime.open(self.bundle.root, variant, self.bundle.manifest.signature, options)
        try:
            self._replay(session)
        except BaseException:
            session.close()
            raise
        return session

    def _replay(self, session: Session) -> None:
        """Run one golden request and hold the answer against the budget."""
        if self.golden:
            why = check_golden(self.task, self.bundle.manifest.budget, self.golden[0], session)
            if why:
                raise SessionError(f"its answer to a golden request is wrong: {why}")


def _key(candidate: Candidate) -> tuple[str, str]:
    return candidate.variant, candidate.runtime


def check_golden(task: Task, budget: Budget, request: GoldenRequest, session: Session) -> str | None:
    """Return why a session's answer to a golden request is outside the budget, or None."""
    got = session.infer(request.feeds)
    if problem := same_outputs(request.outputs, got):
        return problem
    comparison = task.comparison()
    comparison.add(request.outputs, got, request.feeds)
    return "; ".join(budget.violations(comparison.metrics(), single=True)) or None


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
