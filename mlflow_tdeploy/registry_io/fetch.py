"""Down: the records of a model, and the files of one variant."""

from __future__ import annotations

import contextlib
import filecmp
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlflow.models.model import MLMODEL_FILE_NAME

from mlflow_tdeploy.core.errors import ConflictError, IntegrityError, InvalidInputError, NotFoundError, StorageError
from mlflow_tdeploy.core.variant import FileRecord, Variant
from mlflow_tdeploy.registry_io.folder import below
from mlflow_tdeploy.registry_io.location import Location
from mlflow_tdeploy.store.bundle import Bundle, Fetch
from mlflow_tdeploy.store.cache import ContentCache
from mlflow_tdeploy.store.disk import storage_errors
from mlflow_tdeploy.store.hashing import HashCache, verify_file
from mlflow_tdeploy.store.layout import ADDED, EVIDENCE, FILES, MANIFEST, PACK, ROOT, SOURCE, VARIANTS, safe_path
from mlflow_tdeploy.store.pack import unpack
from mlflow_tdeploy.store.prune import used, views_home

#: How often a view is fetched that is pruned as soon as it is there.
_ATTEMPTS = 3
_WORKERS, _RECORD_WORKERS = 4, 8
#: Beside the bundle, for people: no host takes it to serve.
REPORT = ("report.html", "report")
#: Begins the name of the file that says which model a folder is being filled with.
_MARK = ".tdeploy-model-"
#: What to do where a cache has no room.
_MOVE = "(TDEPLOY_CACHE_DIR moves it)"
_log = logging.getLogger("mlflow_tdeploy")


def open_records(
    location: Location, into: Path | None = None, *, packaging: bool = True
) -> tuple[Bundle, Fetch | None]:
    """Return a model's records, and what brings the files of a variant; None where they are here already.

    Args:
        location: The model.
        into: Folder to fetch to, made if need be; None for a folder of this host's cache, or for the place of a model
            that is on this host.
        packaging: All that lies beside the bundle, too: requirements, code. Who loads it as MLflow does needs it,
            others only its MLmodel, which says what was saved about the choice of a variant.

    Raises:
        NotFoundError: There is no such model, or it holds no bundle.
        ConflictError: The folder holds another model.
    """
    if location.local is not None and into is None:
        return Bundle.open(location.local), None
    if into is None:
        bundle = fetch_view(location, packaging=packaging)
    else:
        into.mkdir(parents=True, exist_ok=True)
        bundle = fetch_records(location, into, packaging=packaging)
    return bundle, functools.partial(fetch_variant, location, bundle)


def fetch_records(location: Location, into: Path, *, packaging: bool = True) -> Bundle:
    """Download everything of a model but the files of its variants.

    Args:
        location: The model.
        into: An existing folder that becomes the model directory; empty, or with this very model in it.
        packaging: All that lies beside the bundle, too, and not its MLmodel alone.

    Raises:
        NotFoundError: The model holds no bundle.
        ConflictError: The folder holds another model, whose variants would be taken for this one's.
    """
    repository = location.repository
    try:
        found = {entry.path.rsplit("/", 1)[-1] for entry in repository.list_artifacts(ROOT)}
    except ValueError as error:  # such as an http: address that is none of an artifact proxy
        raise NotFoundError(
            f"No model at '{location.uri}': MLflow reads no artifacts there ({location.said(error)}). Pass models:/…, "
            f"runs:/…, a folder, or the URI of an artifact store."
        ) from error
    if MANIFEST not in found:
        raise NotFoundError(f"'{location.uri}' holds no bundle: it was not logged with the flavor 'tdeploy'.")
    with tempfile.TemporaryDirectory(dir=into, prefix=".tdeploy-") as folder:  # MLflow writes files piece by piece
        wanted = _beside_the_pack(location, found, Path(folder))
        if packaging or not _came(location, MLMODEL_FILE_NAME, folder):
            beside = [entry.path for entry in repository.list_artifacts(None) if entry.path not in (ROOT, *REPORT)]
            wanted += [path for path in beside if packaging or path == MLMODEL_FILE_NAME]
        with ThreadPoolExecutor(_RECORD_WORKERS, thread_name_prefix="tdeploy-records") as pool:  # small files, far away
            list(pool.map(lambda path: repository.download_artifacts(path, folder), wanted))
        _claim(location, Path(folder) / ROOT / MANIFEST, into)
        _merge(Path(folder), into)
    return Bundle.open(into)


def _came(location: Location, path: str, folder: str) -> bool:
    """Fetch a file that is most likely there; False where it did not come, for whatever reason."""
    try:
        return location.download(path, folder).is_file()
    except Exception:  # each kind of store has its own for what is not there
        return False


def _beside_the_pack(location: Location, names: Set[str], folder: Path) -> list[str]:
    """Fetch what is packed, and return what else there is to fetch of a bundle.

    Args:
        location: The model.
        names: What lies in its ``tdeploy`` folder.
        folder: Becomes the model directory.
    """
    if PACK not in names:  # of an older version
        return _unpacked(names)
    with tempfile.TemporaryDirectory(prefix="tdeploy-pack-") as apart:
        try:
            held = unpack(location.download(f"{ROOT}/{PACK}", apart), folder / ROOT)
        except (IntegrityError, InvalidInputError) as error:
            _log.warning("The records of '%s' are fetched one by one: %s", location.uri, error)
            shutil.rmtree(folder / ROOT, ignore_errors=True)
            return _unpacked(names)
    if ADDED not in names:
        return []
    there = {**below(location, f"{ROOT}/{VARIANTS}"), **below(location, f"{ROOT}/{EVIDENCE}")}
    others = (path.removeprefix(f"{ROOT}/") for path in there)
    return [
        f"{ROOT}/{path}" for path in others if path not in held and "/.tdeploy-" not in path
    ]  # a writer is at those


def _unpacked(names: Set[str]) -> list[str]:
    return [f"{ROOT}/{name}" for name in sorted(names - {FILES, SOURCE, PACK, ADDED}) if not name.startswith(".")]


def _claim(location: Location, manifest: Path, into: Path) -> None:
    """Mark a folder as a model's before anything is in it; several processes may fill it with the same one.

    Raises:
        ConflictError: It is another model's, or holds files of who knows which.
    """
    here = into / ROOT
    own = here / f"{_MARK}{hashlib.sha256(manifest.read_bytes()).hexdigest()[:32]}"
    mine = set(here.glob(f"{_MARK}*")) == {own}
    mine = mine or ((here / MANIFEST).is_file() and filecmp.cmp(manifest, here / MANIFEST, shallow=False))
    if not mine and here.is_dir() and any(here.iterdir()):
        raise ConflictError(
            f"'{into}' holds another model, or a part of one. Download '{location.uri}' to an empty folder."
        )
    here.mkdir(parents=True, exist_ok=True)
    own.touch()


def fetch_view(location: Location, *, packaging: bool = True) -> Bundle:
    """Download the records of a model into a folder of this host that is the same every time.

    So what was hashed or fetched for an earlier start counts for the next one. Processes may share the folder:
    every file in it appears at once. Where somebody prunes it at that moment, it is fetched again.

    Raises:
        NotFoundError: There is no such model, or its folder is pruned again and again.
        StorageError: The disk is full or refuses.
    """
    for _ in range(_ATTEMPTS):
        if (bundle := _fetch_view(location, packaging)) is not None:
            return bundle
    raise NotFoundError(
        f"The folder of '{location.uri}' in this host's cache was pruned {_ATTEMPTS} times while it was filled. Try "
        f"again, or download to a folder of your own (dst_path)."
    )


def _fetch_view(location: Location, packaging: bool) -> Bundle | None:
    """Return the bundle in its folder; None where somebody pruned that in the meantime."""
    home = views_home()
    doing = f"fetch '{location.uri}' to this host's cache '{home}' {_MOVE}"
    with storage_errors(doing), tempfile.TemporaryDirectory(dir=home, prefix=".tdeploy-") as folder:
        fetched = fetch_records(location, Path(folder), packaging=packaging)
        key = hashlib.sha256(location.root.encode() + b"\0" + (fetched.root / MANIFEST).read_bytes()).hexdigest()[:32]
        view = home / key
        try:
            view.mkdir(exist_ok=True)
            before = view.stat().st_ino
            _merge(Path(folder), view)
            used(view)
            if view.stat().st_ino != before:  # what came after it was pruned is a part of it
                return None
        except FileNotFoundError:
            return None
    try:
        return Bundle.open(view)
    except NotFoundError:
        return None


def _merge(fresh: Path, view: Path) -> None:
    found = [path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()]
    for folder in {view / path.parent for path in found}:
        folder.mkdir(parents=True, exist_ok=True)
    # The manifest last: without it there is no bundle yet.
    for path in sorted(found, key=lambda path: (path.name == MANIFEST, path)):
        if not ((view / path).is_file() and filecmp.cmp(fresh / path, view / path, shallow=False)):
            os.replace(fresh / path, view / path)


def fetch_variant(location: Location, bundle: Bundle, variant: Variant, cache: ContentCache | None = None) -> None:
    """Bring all that a variant needs into a bundle that was fetched without it, and mend what is damaged.

    A file that is there and what its record says stays. The others come from this host's cache; what the cache has
    not, or has damaged, is downloaded, verified and kept there.

    Raises:
        IntegrityError: A downloaded file is not what the variant's record says: the model itself is damaged.
        StorageError: The disk is full or refuses.
    """
    cache, hashes = cache or ContentCache(), HashCache()
    hint = f" {_MOVE}" if views_home() in bundle.root.parents else ""

    def bring(record: FileRecord) -> None:
        if not _sound(bundle.path(record.path), record, hashes):
            _fetch_file(location, bundle.root, record, cache)
        cache.use(record)

    with storage_errors(f"fetch variant '{variant.id}' to '{bundle.root}'{hint}"):
        bundle.root.mkdir(parents=True, exist_ok=True)  # somebody may have pruned the view
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="tdeploy-fetch") as pool:
            list(pool.map(bring, variant.needed))


def _sound(path: Path, record: FileRecord, hashes: HashCache) -> bool:
    """Tell whether a file is what its record says; a damaged one is removed, for the cache may hold the same inode."""
    if not os.path.lexists(path):
        return False
    try:
        verify_file(path, record, hashes)
    except IntegrityError as error:
        _log.warning("A file is damaged and is fetched again: %s", error)
        if path.is_dir():
            raise
        path.unlink(missing_ok=True)
        return False
    return True


def _fetch_file(location: Location, root: Path, record: FileRecord, cache: ContentCache) -> None:
    target = safe_path(root, record.path)
    with contextlib.suppress(NotFoundError):  # also when another process prunes it between the two
        if cache.has(record):
            cache.link(record, target)
            return
    with tempfile.TemporaryDirectory(dir=root, prefix=".tdeploy-fetch-") as folder:
        got = location.download(f"{ROOT}/{record.path}", folder)
        try:
            verify_file(got, record)
        except IntegrityError as error:
            raise IntegrityError(
                f"'{record.path}' of '{location.uri}' was changed or is incomplete in its artifact store: what came "
                f"from there now is not what the model's record says. Log the model again."
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(got, target)
    with contextlib.suppress(StorageError):  # a cache that cannot be written costs the next download, not this one
        cache.add(target, record)
