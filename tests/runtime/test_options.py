from __future__ import annotations

from dataclasses import dataclass

import pytest

from mlflow_tdeploy.core.errors import ConflictError, InvalidInputError
from mlflow_tdeploy.runtime.backends.ort_cpu import OrtOptions
from mlflow_tdeploy.runtime.options import SessionOptions


@dataclass(frozen=True)
class Own:
    streams: int = 1
    arena: bool = True


def read(config):
    return SessionOptions.of(config, [OrtOptions, Own])


def test_options_of_reads_text_as_people_write_it():
    options = read({"threads": "2", "spinning": "yes", "arena": "off", "graph_level": "basic", "profiling": None})
    assert options.threads == 2
    assert options.settings(OrtOptions) == OrtOptions(spinning=True, arena=False, graph_level="basic")


def test_each_runtime_gets_its_own_options_and_those_it_shares():
    options = read({"arena": False, "streams": 3, "spinning": True})
    assert options.settings(Own) == Own(streams=3, arena=False)
    assert options.settings(OrtOptions) == OrtOptions(spinning=True, arena=False)


def test_what_is_given_apart_comes_before_the_rest():
    options = read({"threads": 2, "arena": True, "session": {"threads": 4, "arena": False}})
    assert options.threads == 4
    assert options.settings(OrtOptions).arena is False


@dataclass(frozen=True)
class OtherDefault:
    arena: bool = False


@dataclass(frozen=True)
class TakesACommonName:
    threads: int = 0


@pytest.mark.parametrize(("kind", "name"), [(OtherDefault, "arena"), (TakesACommonName, "threads")])
def test_two_runtimes_cannot_mean_different_things_by_one_name(kind, name):
    """``model_config`` has one key for both: what one user means by it must be what the other runtime does."""
    with pytest.raises(ConflictError, match=f"'{name}' of {kind.__name__} exists with another meaning"):
        SessionOptions.of({}, [OrtOptions, kind])


def test_with_own_replaces_what_it_names_and_keeps_the_rest():
    options = read({"threads": 2, "arena": False}).with_own(spinning=True)
    assert (options.threads, options.own) == (2, {"arena": False, "spinning": True})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"thread": 2}, "Unknown session option 'thread'. Known: threads"),
        ({"session": {"thread": 2}}, "Unknown session option 'thread'. Known: threads"),
        ({"session": [1]}, "'session' must be a mapping"),
        ({"threads": "two"}, "'threads' must be of type int"),
        ({"threads": True}, "'threads' must be of type int"),
        ({"threads": "--5"}, "'threads' must be of type int"),
        ({"threads": "²"}, "'threads' must be of type int"),
        ({"threads": -1}, "'threads' must not be negative"),
        ({"spinning": "perhaps"}, "'spinning' must be of type bool"),
        ({"graph_level": "most"}, "'graph_level' must be one of disable, basic"),
        ({"execution_mode": "turbo"}, "'execution_mode' must be one of"),
    ],
)
def test_options_of_names_the_option_when_it_is_wrong(config, message):
    with pytest.raises(InvalidInputError, match=message):
        read(config)
