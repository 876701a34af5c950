"""Clients that are not ours: Triton's own, each of its kinds, ask a deployed model for texts."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio

from tests.flavor.text_bundles import embed, make_text_bundle

#: What each client sends at once; answers differ, so a mix-up shows.
TEXTS = ["cat", "a dog", "good", "bad", "a good cat", "a bad dog"]


@pytest.fixture
def addresses(client, running, tmp_path):
    """Deploy an embedding; return where it is over each protocol."""
    bundle = make_text_bundle(tmp_path / "embedding", "sentence-embedding")
    client.create_deployment("words", str(bundle), config={"grace": 0})
    triton = running[0]
    return {"http": f"127.0.0.1:{triton.http}", "grpc": f"127.0.0.1:{triton.grpc}"}


def asked(module, text):
    tensor = module.InferInput("text", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode()]], object))
    return [tensor]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_asyncio_clients_each_get_their_own_answer(addresses, protocol):
    plain = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
    client = {"http": tritonclient.http.aio, "grpc": tritonclient.grpc.aio}[protocol].InferenceServerClient

    async def all_of_them():
        async with client(addresses[protocol]) as one:
            assert await one.is_model_ready("words")
            return await asyncio.gather(*(one.infer("words", asked(plain, text)) for text in TEXTS * 8))

    answers = asyncio.run(all_of_them())
    for text, answer in zip(TEXTS * 8, answers, strict=True):
        np.testing.assert_allclose(answer.as_numpy("sentence_embedding")[0], embed(text), rtol=1e-3)


def test_a_stream_of_grpc_requests_is_answered_each_by_its_own(addresses):
    got = []
    with tritonclient.grpc.InferenceServerClient(addresses["grpc"]) as one:
        one.start_stream(lambda result, error: got.append((result, error)))
        for text in TEXTS:
            one.async_stream_infer("words", asked(tritonclient.grpc, text), request_id=text)
        one.stop_stream()
    assert [error for _, error in got] == [None] * len(TEXTS)
    by_text = {result.get_response().id: result.as_numpy("sentence_embedding")[0] for result, _ in got}
    for text in TEXTS:
        np.testing.assert_allclose(by_text[text], embed(text), rtol=1e-3)
