"""What is taken for a secret, and what is not."""

import json

import pytest

from llfast.fleet.events import JsonLog
from llfast.redaction import without_secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("token hf_abcDEF123456 is wrong", "token [hidden] is wrong"),
        ("api_org_abcDEF123456", "[hidden]"),
        ("AKIAIOSFODNN7EXAMPLE", "[hidden]"),
        ("at https://me:p/ss@host/x", "at https://[hidden]@host/x"),
        ("GET https://h/f?X-Amz-Signature=ab&t=1 (403)", "GET https://h/f?[hidden] (403)"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer [hidden]"),
        ("Authorization: Basic bWU6cGFzcw==", "Authorization: Basic [hidden]"),
        ("with hf_token=abc&x=1", "with hf_token=[hidden]&x=1"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text, expected):
    assert without_secrets(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "meta-llama/Llama-3.1-8B@main must hold tokenizer.json, got none",
        "got 3 tokens at https://huggingface.co/org/model",
        "mail me@host",
        "hf_hub",
        "a basic block of bearers",
    ],
)
def test_what_does_not_is_left_alone(text, monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "main")
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "AZURE_STORAGE_KEY", "DB_PASSWD", "aws_secret_access"]
)
def test_secrets_of_the_environment_are_hidden_whatever_letters_they_have(
    monkeypatch, tmp_path, name
):
    secret = 'pä"ss\\wörd'
    monkeypatch.setenv(name, secret)
    assert without_secrets(f"<{secret}>") == "<[hidden]>"
    log = JsonLog(tmp_path / "events", rank=1)
    log("failed", error=f"no {secret}", ids=[secret] * 50, paged={"a": secret}, seconds=1.5)
    (line,) = (tmp_path / "events").read_text().splitlines()
    event = json.loads(line)
    assert (event["error"], event["paged"]) == ("no [hidden]", {"a": "[hidden]"})
    assert (event["ids"], event["seconds"]) == (["[hidden]"] * 20, 1.5)
