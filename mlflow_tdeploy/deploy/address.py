"""Where a deployment target is: its server and its repository."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping

from mlflow_tdeploy.core.errors import InvalidInputError, UnreachableError, shown
from mlflow_tdeploy.deploy.files import RepositoryFiles, open_files
from mlflow_tdeploy.triton.background import Running, started_at
from mlflow_tdeploy.triton.client import Connection

#: Environment variables; the first two as in NVIDIA's plugin.
URL, REPOSITORY, TOKEN, CA, TIMEOUT = "TRITON_URL", "TRITON_MODEL_REPO", "TRITON_TOKEN", "TRITON_CA", "TRITON_TIMEOUT"
_QUERY = ("protocol", "repository")
_PROTOCOLS = ("http", "https", "grpc", "grpcs")
_HERE = ("127.0.0.1", "localhost")


def connection_of(target_uri: str, environ: Mapping[str, str] = os.environ) -> Connection:
    """Return where the server is.

    Args:
        target_uri: ``tdeploy`` (then ``TRITON_URL`` says it, or ``http://localhost:8000``), or
            ``tdeploy://host:port?protocol=grpc``.
        environ: Environment variables.

    Raises:
        InvalidInputError: It is no such address.
    """
    parsed, query = _parsed(target_uri)
    if parsed.netloc:
        url = f"{query.get('protocol', 'http')}://{parsed.netloc}"
    else:
        given = environ.get(URL) or "localhost:8000"
        url = given if "://" in given else f"{query.get('protocol', 'http')}://{given}"
    try:
        timeout = float(environ.get(TIMEOUT) or 0)
    except ValueError:
        raise InvalidInputError(f"{TIMEOUT} is a number of seconds, got {shown(environ[TIMEOUT])}.") from None
    return Connection(url, environ.get(TOKEN, ""), environ.get(CA, ""), timeout)


def files_of(target_uri: str, environ: Mapping[str, str] = os.environ) -> RepositoryFiles:
    """Return the server's repository, as this host reaches it.

    Args:
        target_uri: As for :func:`connection_of`; ``…?repository=/models`` says it.
        environ: Environment variables; ``TRITON_MODEL_REPO`` says it otherwise. Of a server that ``tdeploy triton
            start`` started on this host it is known.

    Raises:
        InvalidInputError: Nobody says where it is.
        UnreachableError: A server that was started here has ended.
    """
    _, query = _parsed(target_uri)
    connection = connection_of(target_uri, environ)
    local = server_here(connection)
    where = query.get("repository") or environ.get(REPOSITORY) or (local.repository if local else "")
    if not where:
        if (ended := server_here(connection, alive=False)) is not None:
            raise UnreachableError(
                f"The server that was started here at port {ended.http} has ended. Start it again: tdeploy triton "
                f"start {ended.repository}"
            )
        raise InvalidInputError(
            f"Nobody says where the server's model repository is: set {REPOSITORY}, or use a target such as "
            f"tdeploy://host:8000?repository=/models."
        )
    return open_files(where)


def server_here(connection: Connection, *, alive: bool = True) -> Running | None:
    """Return what is known of a server that ``tdeploy triton start`` started on this host; None for any other."""
    host, _, port = connection.address.rpartition(":")
    return started_at(int(port), alive=alive) if host in _HERE else None


def _parsed(target_uri: str) -> tuple[urllib.parse.SplitResult, dict[str, str]]:
    if "@" in target_uri:
        raise InvalidInputError("The target holds a password. Give a token by TRITON_TOKEN instead.")
    parsed = urllib.parse.urlsplit(target_uri if "://" in target_uri else f"{target_uri}://")
    if parsed.scheme != "tdeploy" or parsed.path not in ("", "/"):
        raise InvalidInputError(f"{shown(target_uri)} is no target: use tdeploy or tdeploy://host:port.")
    query = dict(urllib.parse.parse_qsl(parsed.query))
    if unknown := sorted(set(query) - set(_QUERY)):
        raise InvalidInputError(f"Unknown part {shown(unknown[0])} of the target. Known: {', '.join(_QUERY)}.")
    if query.get("protocol", "http") not in _PROTOCOLS:
        raise InvalidInputError(f"The protocol is one of {', '.join(_PROTOCOLS)}, got {shown(query['protocol'])}.")
    return parsed, query
