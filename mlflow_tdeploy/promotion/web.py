"""What a watcher answers over HTTP: webhooks, health, metrics and the status page."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

from mlflow_tdeploy.core.errors import MissingDependencyError, StorageError
from mlflow_tdeploy.promotion import page
from mlflow_tdeploy.promotion.watch import Watch
from mlflow_tdeploy.promotion.webhook import MOST_BYTES, Receiver

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    from mlflow_tdeploy.promotion.metrics import Metrics
except ImportError as error:  # pragma: no cover - depends on the environment
    raise MissingDependencyError(str(error.name), "tdeploy watch", "pip install 'mlflow-tdeploy[watch]'") from error

_log = logging.getLogger("mlflow_tdeploy")
#: Nothing from elsewhere, and no script but the page's own: names and reasons come from whoever writes the registry.
_POLICY = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; frame-ancestors 'none'"
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
_START_S, _MOST_AT_ONCE = 10.0, 100


def make_app(watch: Watch, receiver: Receiver, metrics: Metrics) -> Starlette:
    """Return the application.

    Args:
        watch: Whose state is shown, and who is woken.
        receiver: Tells MLflow's webhooks from others.
        metrics: What is counted.
    """
    answers = _Answers(watch, receiver, metrics)
    return Starlette(
        routes=[
            Route("/webhook", answers.webhook, methods=["POST"]),
            Route("/health", answers.health),
            Route("/ready", answers.ready),
            Route("/metrics", answers.numbers),
            Route("/status.json", answers.status),
            Route("/", answers.shown),
            *(Route(f"/{name}", answers.file) for name in page.FILES),
        ]
    )


@dataclass(frozen=True)
class _Answers:
    watch: Watch
    receiver: Receiver
    metrics: Metrics

    async def webhook(self, request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                break  # the rest is not read
        found = self.receiver.receive(request.headers, body)
        self.metrics.received(found.result)
        if found.accepted:
            self.watch.wake()
        level = logging.WARNING if found.status >= HTTPStatus.BAD_REQUEST else logging.INFO
        more = {"event": "webhook", "result": found.result, "why": found.why}
        _log.log(level, "Webhook %s: %s", found.result, found.why or found.event, extra=more)
        headers = {"Connection": "close"} if len(body) > MOST_BYTES else {}
        return JSONResponse({"result": found.result, "why": found.why}, found.status, headers)

    async def health(self, _: Request) -> Response:
        return JSONResponse({"alive": True})

    async def ready(self, _: Request) -> Response:
        ready = self.watch.ready
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"ready": ready, "why": self.watch.view.error}, status)

    async def numbers(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def status(self, _: Request) -> Response:
        return JSONResponse(asdict(self.watch.view), headers=_HEADERS)

    async def shown(self, _: Request) -> Response:
        return HTMLResponse(page.render(self.watch.view), headers=_HEADERS)

    async def file(self, request: Request) -> Response:
        name = request.url.path.rpartition("/")[2]
        return Response(page.content(name), media_type=page.FILES[name], headers=_HEADERS)


@contextlib.contextmanager
def served(app: Any, listen: str) -> Iterator[str]:
    """Answer at an address, in a thread, for the length of a block.

    Args:
        app: The application.
        listen: Address and port; port 0 for a free one.

    Yields:
        The address that is answered at.

    Raises:
        StorageError: The port is taken.
    """
    host, _, port = listen.rpartition(":")
    config = uvicorn.Config(
        app, host.strip("[]"), int(port), log_config=None, access_log=False, timeout_keep_alive=5, lifespan="off",
        server_header=False, limit_concurrency=_MOST_AT_ONCE, h11_max_incomplete_event_size=MOST_BYTES,
    )  # fmt: skip
    try:
        socket = config.bind_socket()
    except SystemExit:  # as uvicorn says that it cannot
        raise StorageError(f"{listen} cannot be listened at: is the port taken? Say another one: listen.") from None
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, name="tdeploy-web", daemon=True)
    thread.start()
    end = time.monotonic() + _START_S
    while not server.started and thread.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    bound = socket.getsockname()
    try:
        yield f"http://{host}:{bound[1]}"
    finally:
        server.should_exit = True
        thread.join(_START_S)
        socket.close()
