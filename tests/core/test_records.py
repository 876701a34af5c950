import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_tdeploy.core.errors import InvalidInputError, ManifestError
from mlflow_tdeploy.core.evidence import Evidence, after, now
from mlflow_tdeploy.core.records import from_json, to_json


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[str | int, ...] = ()

    def __post_init__(self):
        if self.name == "refused":
            raise InvalidInputError("that name is refused")


@dataclass(frozen=True)
class Outer:
    kind: Literal["a", "b"]
    number: int = 0
    share: float = 0.0
    flag: bool = False
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    by_name: Mapping[str, float] = field(default_factory=dict)
    free: Mapping[str, Any] = field(default_factory=dict)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
numbers = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(
    Inner, texts.filter(lambda name: name != "refused"), st.lists(texts | st.integers(), max_size=3).map(tuple)
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
outers = st.builds(
    Outer,
    kind=st.sampled_from(["a", "b"]),
    number=st.integers(),
    share=numbers,
    flag=st.booleans(),
    inner=st.none() | inners,
    many=st.lists(inners, max_size=3).map(tuple),
    by_name=st.dictionaries(texts, numbers, max_size=3),
    free=st.dictionaries(texts, plain, max_size=3),
)


@given(outers)
def test_from_json_gives_the_record_back_whatever_it_holds(record):
    assert from_json(Outer, to_json(record), "x.json") == record


def test_to_json_is_stable_and_ends_with_a_newline():
    text = to_json(Outer("a", free={"z": 1, "b": 2}))
    assert text == to_json(Outer("a", free={"b": 2, "z": 1}))
    assert text.endswith("}\n")
    assert "inner" not in json.loads(text)  # None is left out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), "\ud800"])
def test_to_json_refuses_when_a_value_cannot_be_stored(value):
    with pytest.raises(ManifestError, match="Cannot write Outer as JSON"):
        to_json(Outer("a", free={"x": value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "c"}, r"x\.json\.kind: expected one of \['a', 'b'\], got 'c'"),
        ({"number": 1.5}, r"x\.json\.number: expected an integer, got 1\.5"),
        ({"number": True}, r"expected an integer, got True"),
        ({"number": "1"}, r"expected an integer, got '1'"),
        ({"share": "much"}, r"x\.json\.share: expected a finite number"),
        ({"share": 10**400}, r"x\.json\.share: expected a finite number"),
        ({"share": True}, r"expected a finite number, got True"),
        ({"flag": 1}, r"x\.json\.flag: expected true or false, got 1"),
        ({"inner": []}, r"x\.json\.inner: expected an object \(Inner\)"),
        ({"inner": {}}, r"x\.json\.inner: the key 'name' is missing"),
        ({"inner": {"name": "refused"}}, r"x\.json\.inner: that name is refused"),
        ({"many": {}}, r"x\.json\.many: expected a list"),
        ({"many": [{"name": "a"}, {"name": 2}]}, r"x\.json\.many\[1\]\.name: expected a string, got 2"),
        ({"by_name": {"p50": None}}, r"x\.json\.by_name\.p50: expected a finite number, got None"),
        ({"free": 3}, r"x\.json\.free: expected an object"),
        ({"unknown": 1}, r"x\.json: unknown key 'unknown'; known keys: kind, number"),
        ({"inner": "x" * 500}, r"got 'x{76}\.\.\.\."),
    ],
)
def test_from_json_names_file_key_and_expectation_when_a_value_is_wrong(change, message):
    with pytest.raises(ManifestError, match=message):
        from_json(Outer, json.dumps({"kind": "a", **change}), "x.json")


@pytest.mark.parametrize(
    "text", ["", "{", b"\xff\xfe", '{"kind": "a", "share": NaN}', '{"kind": "a", "share": 1e999}', "[" * 10**6]
)
def test_from_json_names_the_file_when_text_is_not_json(text):
    with pytest.raises(ManifestError, match=r"x\.json"):
        from_json(Outer, text, "x.json")


def test_from_json_says_missing_when_a_required_key_is_missing():
    with pytest.raises(ManifestError, match=r"x\.json: the key 'kind' is missing"):
        from_json(Outer, "{}", "x.json")


def test_from_json_takes_an_integer_where_a_float_is_expected():
    share = from_json(Outer, '{"kind": "a", "share": 1}', "x.json").share
    assert isinstance(share, float)
    assert share == 1.0


@pytest.mark.parametrize("created", ["zzz", "9999-12-31T23:59:59.999999+00:00"])
def test_a_time_that_nothing_can_come_after_stops_no_new_record(created):
    earlier = Evidence("onnx-fp32", "accuracy", {}, created=created)
    assert after([earlier]) < created
    assert after([]) <= now()
