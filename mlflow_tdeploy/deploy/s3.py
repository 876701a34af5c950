"""A repository in an object store that speaks S3."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import ConflictError, InvalidInputError, MissingDependencyError, StorageError, shown
from mlflow_tdeploy.core.variant import check_relative
from mlflow_tdeploy.deploy.files import LEASE, LEASE_S, Held, RepositoryFiles, lost
from mlflow_tdeploy.store.process import this_process

_MISSING = ("NoSuchKey", "404", "NotFound")
_PART, _LARGEST_COPY = 16 << 20, 5 << 30
_ATTEMPTS = 5
_LEASE_ID = re.compile("[0-9a-f]{16}")
#: Seconds to reach the store, and for each of its answers.
_CONNECT_S, _READ_S = 10, 60
#: In a lease whose holder has seen no other one; seconds that the first of several waits for the others.
_HELD, _CLAIM_S, _PAUSE_S = "held", 10.0, 0.1


def parse_s3(url: str) -> tuple[str | None, str, str]:
    """Return endpoint, bucket and prefix of ``s3://bucket/prefix`` or, as Triton writes it, ``s3://host:port/bucket/prefix``.

    The endpoint is None for Amazon's own; a host may have ``http://`` or ``https://`` before it.

    Raises:
        InvalidInputError: It names no bucket.
    """
    rest = url.removeprefix("s3://")
    scheme = next((one for one in ("http://", "https://") if rest.startswith(one)), "")
    head, _, path = rest.removeprefix(scheme).partition("/")
    if scheme or ":" in head:
        endpoint, (bucket, _, prefix) = f"{scheme or 'http://'}{head}", path.partition("/")
    else:
        endpoint, bucket, prefix = None, head, path
    if "@" in head:  # and what is before it is not shown
        raise InvalidInputError(
            "The address of a repository holds no user and no password: s3://bucket/prefix or "
            "s3://host:port/bucket/prefix, and the keys as boto3 takes them (AWS_ACCESS_KEY_ID, a profile, a role)."
        )
    if not bucket:
        raise InvalidInputError(
            f"{shown(url)} is no repository: use s3://bucket/prefix or s3://host:port/bucket/prefix."
        )
    return endpoint, bucket, prefix.strip("/")


class S3Files(RepositoryFiles):
    """Objects below a prefix of a bucket. Keys, tokens and regions are boto3's business (environment, profile, role).

    Args:
        url: ``s3://bucket/prefix``, or ``s3://http://host:port/bucket/prefix``.

    Raises:
        InvalidInputError: The URL names no bucket.
        MissingDependencyError: boto3 is not installed.
    """

    def __init__(self, url: str) -> None:
        endpoint, self._bucket, self._prefix = parse_s3(url)
        if self._prefix:
            check_relative(self._prefix)
        self.url = url
        self._client = _client(endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))

    def read(self, path: str) -> bytes | None:
        """Return an object's content; None where there is none."""
        with self._errors(f"read '{path}'"):
            try:
                content: bytes = self._client.get_object(Bucket=self._bucket, Key=self._key(path))["Body"].read()
                return content
            except self._client.exceptions.ClientError as error:
                if _code(error) in _MISSING:
                    return None
                raise

    def write(self, path: str, content: bytes) -> None:
        """Write a small object."""
        with self._errors(f"write '{path}'"):
            self._client.put_object(Bucket=self._bucket, Key=self._key(path), Body=content)

    def put(self, path: str, source: Path) -> None:
        """Send a file, in parts with a checksum each where it is large; it is there when all of them are."""
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=_PART, multipart_chunksize=_PART, use_threads=True)
        with self._errors(f"send '{path}'"):
            self._client.upload_file(str(source), self._bucket, self._key(path), Config=config)

    def copy(self, source: str, path: str) -> None:
        """Copy an object inside the store, in one request where that may be."""
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=_LARGEST_COPY, multipart_chunksize=_LARGEST_COPY // 10)
        with self._errors(f"copy '{source}'"):
            whole = {"Bucket": self._bucket, "Key": self._key(source)}
            self._client.copy(whole, self._bucket, self._key(path), Config=config)

    def remove(self, path: str) -> None:
        """Remove an object; one that is not there is fine."""
        with self._errors(f"remove '{path}'"):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(path))

    def below(self, folder: str) -> dict[str, int]:
        """Return size by path of every object below a folder."""
        top = f"{self._key(folder)}/"
        return {one["Key"].removeprefix(top): int(one["Size"]) for one in self._list(top) if one["Key"] != top}

    def models(self) -> list[str]:
        """Return the names of the models' folders."""
        top = f"{self._prefix}/" if self._prefix else ""
        with self._errors("list models"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=top, Delimiter="/"
            )
            found = [one["Prefix"] for page in pages for one in page.get("CommonPrefixes", ())]
        names = [prefix.removeprefix(top).rstrip("/") for prefix in found]
        return sorted(name for name in names if name and not name.startswith("."))

    @contextlib.contextmanager
    def lease(self, name: str, seconds: float = LEASE_S) -> Iterator[Held]:
        """Hold an object of one's own; who sees another one that is young gives way, so that never two go on.

        Works on any store that lists what was written. Of those that begin at the same moment, of whom none holds it
        yet, the one whose name is the first stays and waits for the others to give way.
        """
        start = f"{LEASE}{name}."
        own = f"{start}{secrets.token_hex(8)}"
        content = json.dumps({**this_process(), _HELD: True}).encode()
        self.write(own, json.dumps(this_process()).encode())

        def held() -> None:
            if self.read(own) is None:
                raise lost(name, self.url)

        done = threading.Event()
        try:
            self._wait(name, start, own, seconds)
            self.write(own, content)
            renew = (own, content, done, seconds / 4)
            threading.Thread(target=self._renew, args=renew, daemon=True, name="tdeploy-lease").start()
            yield held
        finally:
            done.set()
            with contextlib.suppress(StorageError):
                self.remove(own)

    def _wait(self, name: str, start: str, own: str, seconds: float) -> None:
        """Wait until nobody else wants the lease; give way to who has it, or came at the same moment and is the first.

        Raises:
            ConflictError: Another one has it, or comes first.
        """
        end = time.monotonic() + _CLAIM_S
        while others := self._young(start, own, seconds):
            claims = {one: _claim(content) for one in others if (content := self.read(one)) is not None}
            if not claims:
                time.sleep(_PAUSE_S)
                continue  # they have given way meanwhile
            having = next((one for one in claims.values() if one.get(_HELD)), None)
            if having or min(claims) < own or time.monotonic() > end:
                other = having or claims[min(claims)]
                raise ConflictError(
                    f"'{name}' in '{self.url}' is being changed by process {other.get('pid', '?')} on "
                    f"{other.get('host', '?')}. Wait until that is done, or {seconds:.0f} s if it has died."
                )
            time.sleep(_PAUSE_S)

    def _young(self, start: str, own: str, seconds: float) -> list[str]:
        """Return the leases of others that somebody has renewed lately, by the store's clock; old ones are removed."""
        with self._errors("list leases"):
            answer = self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._key(start))
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        now = parsedate_to_datetime(headers["date"]).timestamp() if "date" in headers else time.time()
        found = []
        for one in answer.get("Contents", ()):
            name = one["Key"].rpartition("/")[2]
            if name == own or not _LEASE_ID.fullmatch(name.removeprefix(start)):
                continue  # a lease of 'm.large' begins as one of 'm' does
            if now - one["LastModified"].timestamp() < seconds:
                found.append(name)
            else:
                self.remove(name)
        return found

    def _renew(self, path: str, content: bytes, done: threading.Event, every: float) -> None:
        while not done.wait(every):
            with contextlib.suppress(StorageError):
                if self.read(path) is None:
                    return  # somebody took this deployer for dead
                self.write(path, content)
        with contextlib.suppress(StorageError):  # where it was written again after it was removed
            self.remove(path)

    def _list(self, prefix: str) -> list[dict[str, Any]]:
        with self._errors(f"list '{prefix}'"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
            return [one for page in pages for one in page.get("Contents", ())]

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{check_relative(path)}" if self._prefix else check_relative(path)

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, Boto3Error, ClientError, OSError) as error:
            inner = error.__context__ if isinstance(error, Boto3Error) else None  # what its upload of a file met
            refused = next((one for one in (error, inner) if isinstance(one, ClientError)), None)
            why = {
                "NoSuchBucket": f"there is no bucket '{self._bucket}'",
                "SignatureDoesNotMatch": "the secret key is not the one of the access key (AWS_SECRET_ACCESS_KEY)",
                "InvalidAccessKeyId": "the access key is not known there (AWS_ACCESS_KEY_ID)",
                "AccessDenied": "access is denied: are these the right keys, and may they do that?",
                "403": "access is denied: are these the right keys, and may they do that?",
            }.get(_code(refused) if refused else "", str(error).rstrip("."))
            raise StorageError(f"The store '{self.url}' cannot {doing}: {why}.") from error


def _claim(content: bytes) -> dict[str, Any]:
    """Return what a lease says; one that is damaged is somebody's all the same."""
    with contextlib.suppress(ValueError):
        found = json.loads(content)
        return found if isinstance(found, dict) else {_HELD: True}
    return {_HELD: True}


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _client(endpoint: str | None) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise MissingDependencyError("boto3", "A repository in S3", "pip install 'mlflow-tdeploy[s3]'") from error
    style = {"addressing_style": "path"} if endpoint else {}
    config = Config(
        retries={"max_attempts": _ATTEMPTS, "mode": "standard"},
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
        s3=style,
    )
    session = boto3.session.Session()  # the default one keeps the keys that it was first used with
    return session.client("s3", endpoint_url=endpoint, config=config)
