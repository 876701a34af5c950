"""What a client has to know of a deployment to ask it."""

from __future__ import annotations

import json

from mlflow_tdeploy.core.columns import TEXT, TEXT_PAIR
from mlflow_tdeploy.core.records import to_plain
from mlflow_tdeploy.deploy.ask import _columns


def test_a_deployment_of_before_reads_single_texts_and_a_new_one_what_it_says():
    assert _columns({"takes": "text"}) == (TEXT,)
    assert _columns({"takes": "tensors"}) == ()
    said = json.dumps([to_plain(TEXT), to_plain(TEXT_PAIR)])
    assert _columns({"takes": "text", "columns": said}) == (TEXT, TEXT_PAIR)
