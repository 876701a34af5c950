"""The log of a command that runs for long: a line for people, or a JSON object for programs."""

from __future__ import annotations

import datetime
import json
import logging
import sys

#: What Python's own records have; the rest was said in ``extra``.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``message``, and what else was said."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        more = {key.rstrip("_"): value for key, value in vars(record).items() if key not in _OWN and value is not None}
        found = {"time": at, "level": record.levelname.lower(), "message": record.getMessage(), **more}
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str, ensure_ascii=False)


def log_to_stderr(form: str) -> None:
    """Write this package's log to the error output.

    Args:
        form: ``json`` or ``text``; empty for text on a terminal, JSON elsewhere.
    """
    handler = logging.StreamHandler(sys.stderr)
    plain = (form or ("text" if sys.stderr.isatty() else "json")) == "text"
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s") if plain else JsonLines())
    logger = logging.getLogger("mlflow_tdeploy")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
