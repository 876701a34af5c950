import pytest

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.runtime.base import SessionOptions


def test_options_of_reads_text_as_people_write_it():
    options = SessionOptions.of(
        {"threads": "2", "spinning": "yes", "arena": "off", "graph_level": "basic", "profiling": None}
    )
    assert options == SessionOptions(threads=2, spinning=True, arena=False, graph_level="basic")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"thread": 2}, "Unknown session option 'thread'. Known: threads"),
        ({"threads": "two"}, "'threads' must be of type int"),
        ({"threads": True}, "'threads' must be of type int"),
        ({"threads": -1}, "'threads' must not be negative"),
        ({"spinning": "perhaps"}, "'spinning' must be of type bool"),
        ({"graph_level": "most"}, "'graph_level' must be one of disable, basic"),
        ({"execution_mode": "turbo"}, "'execution_mode' must be one of"),
    ],
)
def test_options_of_names_the_option_when_it_is_wrong(config, message):
    with pytest.raises(InvalidInputError, match=message):
        SessionOptions.of(config)
