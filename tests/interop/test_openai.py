"""The official `openai` Python client against our HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.cluster import Cluster

TOKENS = 24


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_streamed_completion_equals_the_whole_one(client: openai.OpenAI, cluster: Cluster) -> None:
    asked = {"model": cluster.model, "prompt": "def ", "max_tokens": TOKENS, "temperature": 0.8, "seed": 7}
    extra = {"ignore_eos": True}
    whole = client.completions.create(**asked, extra_body=extra)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == TOKENS
    assert whole.choices[0].finish_reason == "length"

    chunks = list(
        client.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, extra_body=extra
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_a_chat_streams(client: openai.OpenAI, cluster: Cluster) -> None:
    stream = client.chat.completions.create(
        model=cluster.model,
        messages=[{"role": "user", "content": "sort a list"}],
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    deltas = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas)
    assert deltas[0].delta.role == "assistant"
    assert deltas[-1].finish_reason == "length"


def test_the_model_is_listed(client: openai.OpenAI, cluster: Cluster) -> None:
    assert [model.id for model in client.models.list()] == [cluster.model]


def test_an_unknown_model_is_the_clients_own_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="x")
