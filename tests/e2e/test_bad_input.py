"""Bad input to a real cluster: a typed error for its sender, nothing for anybody else."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.until import until_sync

GOOD: dict[str, Any] = {"prompt": "def ", "max_tokens": 12, "temperature": 0, "return_token_ids": True}


def post(cluster: Cluster, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    data = json.dumps({"model": cluster.model} | body).encode()
    request = urllib.request.Request(f"{cluster.http}/v1/completions", data)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def metric(cluster: Cluster, name: str) -> float:
    with urllib.request.urlopen(f"{cluster.http}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"prompt": "x " * 20_000}, 400, "prompt_too_long"),
        ({"prompt": "x", "max_tokens": 1_000_000}, 400, "max_tokens_too_large"),
        ({"prompt": [1, 2, 999_999]}, 400, "invalid_token_id"),
        ({"prompt": ""}, 400, "empty_prompt"),
        ({"prompt": "x", "temperature": -1}, 400, "invalid_argument"),
        ({"prompt": "x", "model": "nobody"}, 404, "unknown_model"),
        ({"prompt": "x", "surprise": 1}, 400, "invalid_argument"),
    ],
)
def test_bad_input_harms_nobody(cluster: Cluster, body: dict[str, Any], status: int, code: str) -> None:
    _, before = post(cluster, GOOD)
    got, answer = post(cluster, body)
    assert (got, answer["error"]["code"]) == (status, code)
    _, after = post(cluster, GOOD)
    assert after["choices"] == before["choices"]


def test_a_client_that_disconnects_frees_the_engine_at_once(cluster: Cluster) -> None:
    """The step after the cancel has no sequence: long before its 900 tokens could be generated."""
    tokens = 900
    body = {
        "model": cluster.model,
        "prompt": "def ",
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
    }
    request = urllib.request.Request(f"{cluster.http}/v1/completions", json.dumps(body).encode())
    response = urllib.request.urlopen(request)
    received = 0
    while received < 3:
        received += response.readline().startswith(b"data: ")
    assert metric(cluster, "phalanx_replica_load") == 1
    response.close()
    until_sync(lambda: metric(cluster, "phalanx_replica_load") == 0)
    assert metric(cluster, "phalanx_live_requests") == 0
    assert metric(cluster, "phalanx_cancelled_total") >= 1


def test_chat_fills_the_context_when_no_limit_is_given(cluster: Cluster) -> None:
    body = {
        "model": cluster.model,
        "messages": [{"role": "user", "content": "import os"}],
        "ignore_eos": True,
        "temperature": 0,
    }
    with urllib.request.urlopen(f"{cluster.http}/v1/models") as response:
        limit = json.load(response)["data"][0]["max_model_len"]
    request = urllib.request.Request(f"{cluster.http}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=110) as response:
        answer = json.load(response)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == limit


def test_stop_texts_end_the_text_before_them(cluster: Cluster) -> None:
    _, whole = post(cluster, GOOD | {"max_tokens": 40, "ignore_eos": True})
    text = whole["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    _, cut = post(cluster, GOOD | {"max_tokens": 40, "ignore_eos": True, "stop": [stop]})
    assert cut["choices"][0]["text"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] == len(cut["choices"][0]["token_ids"]) < 40


def test_a_layout_without_enough_workers_stays_pending_with_its_reason(
    cluster: Cluster, tmp_path: Path
) -> None:
    spec = tmp_path / "large.yaml"
    spec.write_text(json.dumps({"name": "large", "model": str(cluster.model_dir), "tp": 2, "pp": 2}))
    assert cluster.phalanx("apply", "-f", str(spec)).returncode == 0
    try:
        (large,) = json.loads(cluster.phalanx("get", "deployments", "large", "-o", "json").stdout)
        assert large["state"] == "pending"
        assert "4" in large["reason"]
        assert post(cluster, GOOD)[0] == 200
    finally:
        assert cluster.phalanx("delete", "deployment", "large").returncode == 0


def test_a_layout_that_does_not_divide_the_heads_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    spec = tmp_path / "odd.yaml"
    spec.write_text(json.dumps({"name": "odd", "model": str(cluster.model_dir), "tp": 3}))
    refused = cluster.phalanx("apply", "-f", str(spec))
    assert refused.returncode != 0
    assert "heads" in refused.stderr


def test_a_model_directory_without_weights_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((cluster.model_dir / "config.json").read_text())
    spec = tmp_path / "empty.yaml"
    spec.write_text(json.dumps({"name": "empty", "model": str(tmp_path)}))
    refused = cluster.phalanx("apply", "-f", str(spec))
    assert refused.returncode != 0
    assert "safetensors" in refused.stderr
