"""The picture of accuracy against speed: who is who, however many there are."""

from __future__ import annotations

import pytest

from mlflow_tdeploy.registry_io.plot import Point, draw


def _drawn(count: int) -> tuple[list[str], list[str]]:
    axis = draw(
        [Point(f"variant-{index}", 5.0 + index, 0.99) for index in range(count)], x="ms", y="cosine", named=True
    ).axes[0]
    legend = axis.get_legend()
    return [one.get_text() for one in axis.texts], [one.get_text() for one in legend.texts] if legend else []


def test_a_few_have_their_names_beside_them() -> None:
    assert _drawn(3) == (["variant-0", "variant-1", "variant-2"], [])


def test_many_have_numbers_and_a_list_of_names() -> None:
    beside, listed = _drawn(8)
    assert beside == [str(number) for number in range(1, 9)]
    assert listed == [f"{number}  variant-{number - 1}" for number in range(1, 9)]


@pytest.mark.parametrize("x", [0.0, 7.0])
def test_every_point_is_within_the_picture(x: float) -> None:
    axis = draw([Point("a", x, 1.0)], x="ms", y="cosine").axes[0]
    low, high = axis.get_xlim()
    assert low <= x < high
