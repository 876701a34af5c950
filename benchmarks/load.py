"""Clients that ask as fast as they are answered, in a process of their own: ``python -m benchmarks.load``.

Plain HTTP on connections that stay open, so that what is measured is the server. Reads what to do as JSON from standard
input and prints what came of it.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from typing import Any

import numpy as np


def main() -> int:
    """Run one load."""
    print(json.dumps(run(json.load(sys.stdin))))
    return 0


def run(load: dict[str, Any]) -> dict[str, Any]:
    """Ask for some seconds.

    Args:
        load: ``port``, ``path``, ``bodies`` (one for each request, in turn), ``headers``, ``clients``, ``seconds``.

    Returns:
        Requests per second, quantiles of the time to an answer in ms, how many requests and failures.
    """
    begin = time.perf_counter() + 0.1
    end = begin + load["seconds"]
    times: list[list[float]] = [[] for _ in range(load["clients"])]
    failures: list[str] = []
    threads = [
        threading.Thread(target=_client, args=(load, index, begin, end, times[index], failures))
        for index in range(load["clients"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = np.array([one for some in times for one in some]) * 1e3
    if not len(taken):
        raise SystemExit(f"nothing was answered: {failures[:1]}")
    p50, p90, p99 = np.percentile(taken, (50, 90, 99))
    return {
        "requests_per_s": len(taken) / load["seconds"], "p50_ms": p50, "p90_ms": p90, "p99_ms": p99,
        "requests": len(taken), "failures": len(failures), "first_failure": failures[:1],
    }  # fmt: skip


def _client(
    load: dict[str, Any], index: int, begin: float, end: float, times: list[float], failures: list[str]
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", load["port"], timeout=120)
    bodies = [body.encode() for body in load["bodies"]]
    place = index * 7
    time.sleep(max(0.0, begin - time.perf_counter()))
    while (started := time.perf_counter()) < end:
        body = bodies[place % len(bodies)]
        place += 1
        try:
            connection.request("POST", load["path"], body, load["headers"])
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != http.HTTPStatus.OK:
                raise OSError(f"{answer.status}: {content[:300]!r}")
        except (OSError, http.client.HTTPException) as error:
            failures.append(str(error))
            connection.close()
            continue
        times.append(time.perf_counter() - started)
    connection.close()


if __name__ == "__main__":
    raise SystemExit(main())
