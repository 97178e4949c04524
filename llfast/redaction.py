"""Secrets are taken out of whatever is printed, logged or stored."""

from __future__ import annotations

import os
import re

_HIDDEN = "[hidden]"
_LEAST_SECRET = 8  # characters of the environment: shorter ones are found in innocent words
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|_KEY$|_KEY_")
_LOOKS = (  # tokens of the Hub and of clouds, passwords and signatures in addresses, headers
    (re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{6,}"), _HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"), _HIDDEN),
    (re.compile(r"(?<=://)\S+(?=@[\w.-]+)"), _HIDDEN),
    (re.compile(r"(\w://[^\s?'\"<>]*\?)[^\s'\"<>]+"), rf"\1{_HIDDEN}"),
    (re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w.~+/=-]{6,}"), rf"\1{_HIDDEN}"),
    (
        re.compile(r"(?i)\b(\w*(?:token|secret|password|passwd|signature|api_?key)=)[^\s&'\"]+"),
        rf"\1{_HIDDEN}",
    ),
)


def without_secrets(text: str) -> str:
    """Text without what looks like a secret, and without the secrets of the environment."""
    for name, value in os.environ.items():
        if len(value) >= _LEAST_SECRET and _SECRET_NAME.search(name.upper()):
            text = text.replace(value, _HIDDEN)
    for pattern, instead in _LOOKS:
        text = pattern.sub(instead, text)
    return text
