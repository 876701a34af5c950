"""What should be served where: ``tdeploy.yaml``.

::

    targets:
      production:
        servers: [http://triton-1:8000, http://triton-2:8000]
        repository: s3://models/triton
        token: ${TRITON_TOKEN}
    models:
      - name: intent              # or a pattern, such as "sentiment-*"
        alias: champion           # or stage: Production
        to: production
        serve: {device: cpu, keep: 2, max_queue_delay_microseconds: 500}
        gates: {signature: compatible}
        strategy: {canary: {percent: 10, minutes: 10}}   # or shadow, or switch
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator

from mlflow_tdeploy.core.errors import InvalidInputError, first_line
from mlflow_tdeploy.deploy.choose import plain_name
from mlflow_tdeploy.deploy.settings import DeploySettings
from mlflow_tdeploy.promotion.document import Document, Where, read
from mlflow_tdeploy.promotion.part import Part
from mlflow_tdeploy.promotion.strategy import Shadow, Strategy, Trying
from mlflow_tdeploy.triton.names import check_name

_PATTERN = "*?["
_ADDRESS = re.compile(r"(https?|grpcs?)://[^@/\s]+/?")
#: Stages that a version can be served for.
STAGES = ("Staging", "Production", "Archived")
_WEB = re.compile(r"https?://[^@/\s]+(/\S*)?")
_MOST_PORT = 65535
_TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: Keys of ``-C`` that are said of one call, and of no deployment.
_OF_A_CALL = ("version", "config_file")


class Server(Part):
    """A Triton server.

    Attributes:
        url: Its address: ``http://host:8000``, ``grpcs://host:8001``, …
        repository: Its model repository, where servers have one each.
    """

    url: str
    repository: str = ""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, given: str) -> str:
        if not _ADDRESS.fullmatch(given):
            raise ValueError("this is no address of a server, such as http://host:8000 or grpcs://host:8001")
        return given.rstrip("/")

    @model_validator(mode="before")
    @classmethod
    def _of_an_address(cls, given: Any) -> Any:
        return {"url": given} if isinstance(given, str) else given


class Target(Part):
    """Servers that serve the same.

    Attributes:
        servers: Each of them; they are changed one by one.
        repository: The model repository that they have in common.
        token: Sent as a bearer token.
        ca: A file with the certificates to trust.
        timeout: Seconds that any answer may take; 0 for the usual.
    """

    servers: tuple[Server, ...] = Field(min_length=1)
    repository: str = ""
    token: SecretStr = SecretStr("")
    ca: str = ""
    timeout: float = Field(default=0.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _of_one_server(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "server" in given and "servers" not in given:
            rest = {key: value for key, value in given.items() if key != "server"}
            return {**rest, "servers": [given["server"]]}
        return given

    @model_validator(mode="after")
    def _has_repositories(self) -> Target:
        without = [one.url for one in self.servers if not (one.repository or self.repository)]
        if without:
            raise ValueError(f"nobody says where the model repository of {without[0]} is: repository=…")
        return self

    def repository_of(self, server: Server) -> str:
        """Return the repository of one of its servers."""
        return server.repository or self.repository


class Metric(Part):
    """How good a version has to be on labelled texts, beside the one that serves.

    Attributes:
        data: File with the columns ``text`` and ``label`` (CSV, else JSON lines); relative to ``tdeploy.yaml``.
        worse_by: How much worse it may be.
        name: The metric; the task's first one by default.
    """

    data: str = Field(min_length=1)
    worse_by: float = Field(default=0.0, ge=0)
    name: str = ""


class Gates(Part):
    """What a version has to pass besides its own budget and golden requests.

    Attributes:
        signature: ``compatible`` with what serves (who asks that is answered by this, too), the ``same``, or ``any``.
        metric: How good it has to be on labelled texts; None for no such gate.
    """

    signature: Literal["compatible", "same", "any"] = "compatible"
    metric: Metric | None = None


class Rule(Part):
    """Which version of which models is to be served where.

    Attributes:
        name: Name of a registered model, or a pattern (``sentiment-*``).
        alias: The version is the one with this alias.
        stage: The version is the newest one in this stage.
        to: Names of targets.
        deploy_as: The stable name on the servers; the model's by default.
        serve: How it is served: keys of ``-C``.
        gates: What it has to pass.
        strategy: How it comes to answer everybody.
        variants: ``pinned``: what a plan has seen; ``auto``: what suits the server when it is applied.
    """

    name: str = Field(min_length=1)
    alias: str = ""
    stage: str = ""
    to: tuple[str, ...] = Field(min_length=1)
    deploy_as: str = ""
    serve: Mapping[str, Any] = Field(default_factory=dict)
    gates: Gates = Gates()
    strategy: Strategy = Strategy()
    variants: Literal["pinned", "auto"] = "pinned"

    @model_validator(mode="before")
    @classmethod
    def _to_one_target(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and isinstance(given.get("to"), str):
            return {**given, "to": [given["to"]]}
        return given

    @field_validator("stage")
    @classmethod
    def _is_a_stage(cls, given: str) -> str:
        if given and given not in STAGES:
            raise ValueError(f"there is no stage {given!r}. There are: {', '.join(STAGES)}")
        return given

    @model_validator(mode="after")
    def _says_which_version(self) -> Rule:
        if bool(self.alias) == bool(self.stage):
            raise ValueError("say which version by alias: or by stage:, one of the two")
        if self.is_pattern and self.deploy_as:
            raise ValueError("deploy_as is one name, and a pattern may stand for several models")
        return self

    @property
    def is_pattern(self) -> bool:
        """Whether it may stand for several models."""
        return any(sign in self.name for sign in _PATTERN)

    def served_as(self, model: str) -> str:
        """Return the stable name of a registered model."""
        return self.deploy_as or plain_name(model)

    def matches(self, model: str) -> bool:
        """Tell whether it is about a registered model."""
        return fnmatch.fnmatchcase(model, self.name) if self.is_pattern else model == self.name


class Watching(Part):
    """How ``tdeploy watch`` watches.

    Attributes:
        interval: Seconds between two looks at the registry and the servers.
        listen: Address and port for webhooks, metrics and the status page.
        url: Where MLflow reaches ``/webhook`` of that, for ``--install-webhook``.
        secret: What MLflow signs webhooks with.
    """

    interval: float = Field(default=30.0, ge=0.1)
    listen: str = "127.0.0.1:9464"
    url: str = ""
    secret: SecretStr = SecretStr("")

    @field_validator("listen")
    @classmethod
    def _is_a_place(cls, given: str) -> str:
        host, _, port = given.rpartition(":")
        if not (host and port.isdigit() and int(port) <= _MOST_PORT):
            raise ValueError("write it as address:port, such as 127.0.0.1:9464")
        return given

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, given: str) -> str:
        if given and not _WEB.fullmatch(given):
            raise ValueError("this is no address that MLflow can send to, such as https://watch.example.org/webhook")
        return given


class Spec(Part):
    """What should be served where.

    Attributes:
        targets: By name.
        models: Which versions; of several about one model under one name on a target, the first one counts.
        watch: How ``tdeploy watch`` watches.
    """

    targets: Mapping[str, Target] = Field(min_length=1)
    models: tuple[Rule, ...] = Field(min_length=1)
    watch: Watching = Watching()

    @classmethod
    def read(cls, path: str | Path) -> Spec:
        """Read a file.

        Raises:
            NotFoundError: There is none.
            InvalidInputError: It is wrong; the message names line and key.
        """
        return cls.of(read(Path(path)))

    @classmethod
    def of(cls, document: Document) -> Spec:
        """Read a document, see :meth:`read`."""
        if not isinstance(document.content, dict):
            raise document.error((), "a mapping with 'targets' and 'models' belongs here.")
        try:
            found = cls.model_validate(document.content)
        except ValidationError as error:
            raise _told(document, error) from None
        for target in found.targets:
            if not _TARGET.fullmatch(target):
                raise document.error(
                    ("targets", target), "a target is called with 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'."
                )
        rules = []
        for index, rule in enumerate(found.models):
            _check_rule(document, found, rule, ("models", index))
            rules.append(_with_file(document, rule, ("models", index)))
        return found.model_copy(update={"models": tuple(rules)})


def _check_rule(document: Document, spec: Spec, rule: Rule, where: Where) -> None:
    for target in rule.to:
        if target not in spec.targets:
            raise document.error(
                (*where, "to"), f"there is no target '{target}'. There are: {', '.join(spec.targets)}."
            )
    if rule.deploy_as:
        _checked(document, (*where, "deploy_as"), check_name, rule.deploy_as)
    for key, value in rule.serve.items():
        if key in _OF_A_CALL:
            raise document.error((*where, "serve", key), "that is said of one call, not of a deployment. Leave it out.")
        _checked(document, (*where, "serve", key), DeploySettings.of, {key: value})
    _checked(document, (*where, "serve"), DeploySettings.of, dict(rule.serve))


def _with_file(document: Document, rule: Rule, where: Where) -> Rule:
    """Return a rule whose file of labelled texts, or folder of images, is named from the root."""
    metric = rule.gates.metric
    if metric is None:
        return rule
    path = Path(document.name).parent.absolute() / metric.data
    if not path.exists():
        raise document.error((*where, "gates", "metric", "data"), f"there is no file '{path}'.")
    gates = rule.gates.model_copy(update={"metric": metric.model_copy(update={"data": str(path)})})
    return rule.model_copy(update={"gates": gates})


def _checked(document: Document, where: Where, check: Any, value: Any) -> None:
    try:
        check(value)
    except InvalidInputError as error:
        raise document.error(where, first_line(error)) from None


def _told(document: Document, error: ValidationError) -> InvalidInputError:
    """Return the first of what is wrong, in our words, with its place; a wrong word before what is missing for it."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    where: Where = tuple(first["loc"])
    if where[2:4] == ("servers", 0) and where[:3] not in document.lines:
        where = (*where[:2], "server", *where[4:])
    why = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        why = f"this key is unknown. Known here: {', '.join(_known(where[:-1]))}"
    elif first["type"] == "missing":
        where, why = where[:-1], f"'{where[-1]}' is missing"
    return document.error(where, f"{why[:1].lower()}{why[1:]}.")


def _known(where: Where) -> list[str]:
    """Return the keys that a part may have."""
    parts: dict[tuple[str, ...], type[Part]] = {
        (): Spec, ("targets",): Target, ("targets", "servers"): Server, ("targets", "server"): Server,
        ("models",): Rule, ("models", "gates"): Gates, ("models", "gates", "metric"): Metric, ("watch",): Watching,
        ("models", "strategy"): Strategy, ("models", "strategy", "canary"): Trying,
        ("models", "strategy", "shadow"): Shadow,
    }  # fmt: skip
    names = tuple(one for one in where if isinstance(one, str))
    kind = names if names[:1] != ("targets",) else (names[0], *names[2:])
    return [*parts[kind].model_fields] if kind in parts else []
