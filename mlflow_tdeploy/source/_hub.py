"""Hub ids: from a name to one commit's files on this host, safetensors only."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mlflow_tdeploy.core.errors import InvalidInputError, MissingDependencyError, NotFoundError, first_line
from mlflow_tdeploy.source._options import Options, is_commit

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
#: What a model and its tokenizer consist of; pickles are never downloaded.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
_CODE = ("*.py",)


def is_hub_id(text: str) -> bool:
    """Tell whether a text has the form ``name`` or ``owner/name``."""
    return _ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def fetch(hub_id: str, options: Options) -> tuple[Path, str]:
    """Download one commit of a repository, or find it in the local cache.

    Returns:
        The folder and the commit.

    Raises:
        NotFoundError: The repository or revision does not exist, or the hub cannot be reached.
        InvalidInputError: The repository would run code of another, unpinned one.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingDependencyError("huggingface_hub", "A hub id", "pip install 'mlflow-tdeploy[build]'") from None
    revision = options.revision
    try:
        commit = revision if revision and is_commit(revision) else _current_commit(hub_id, options)
        patterns = [*_FILES, *(_CODE if options.trust_remote_code else ())]
        folder = Path(snapshot_download(hub_id, revision=commit, token=options.token, allow_patterns=patterns))
    except Exception as error:  # also what the HTTP library of the day raises where there is no network
        raise NotFoundError(
            f"The model '{hub_id}'{f' at {revision}' if revision else ''} is no local folder and cannot be read from "
            f"the hub ({type(error).__name__}: {first_line(error)}). Check the name, the token and the network, or "
            f"download it where the hub is reachable and pass the folder."
        ) from error
    if options.trust_remote_code:
        _check_code(folder, hub_id)
    return folder, commit


def _current_commit(hub_id: str, options: Options) -> str:
    from huggingface_hub import HfApi

    commit = HfApi(token=options.token).model_info(hub_id, revision=options.revision).sha
    if not is_commit(commit):
        raise ValueError(f"The hub gave no commit for '{hub_id}'.")
    return str(commit)


def _check_code(folder: Path, hub_id: str) -> None:
    """Refuse code of another repository: its commit is not pinned by this one's."""
    for path in folder.rglob("*.json"):
        if path.name not in ("config.json", "tokenizer_config.json", "processor_config.json"):
            continue
        mapped = json.loads(path.read_text("utf-8")).get("auto_map") or {}
        values = [v for value in mapped.values() for v in (value if isinstance(value, list) else [value])]
        if other := next((str(value) for value in values if "--" in str(value)), None):
            raise InvalidInputError(
                f"'{hub_id}' runs code of another repository ({other.split('--')[0]}), which its commit does not pin. "
                f"Load the model yourself and pass the object."
            )
