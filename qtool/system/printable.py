"""Text of others made fit to be shown: no control characters, and no secrets.

Names, paths, keys and messages of libraries reach the terminal, logs and reports. ``shown`` is applied where text goes
out, not where a message is made.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

HIDDEN = "***"  # replaces a secret
MIN_SECRET = 8  # characters of the shortest value of an environment variable that is taken for a secret

_CONTROL = re.compile(  # C0 but tab and newline, DEL, C1, separators of lines, bidirectional overrides, lone surrogates
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|SECRET_KEY|PRIVATE_KEY)$", re.I)
_SECRETS = (  # patterns, each with what replaces it
    (re.compile(r"(://)[^\s/@]*:(?!\d+(?:[/\s?#]|$))[^\s@]*@"), rf"\1{HIDDEN}@"),  # a slash in the password too
    (re.compile(r"(://)[^\s/]+@"), rf"\1{HIDDEN}@"),
    (  # parameters of a URL
        re.compile(
            r"""(?i)([?&;][^\s=&;"'<>]*(?:token|key|secret|sig|credential|password|passwd|policy)[^\s=&;]*=)"""
            r"""[^\s&;"'<>#]+"""
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(?i)(authorization\W{1,6}(?:basic\s+)?|bearer\s+)(?!bearer\b)[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"\b(?:hf_[a-zA-Z0-9]{20,}|api_org_[a-zA-Z]{20,}|gh[opsur]_\w{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16})\b"
        ),
        HIDDEN,
    ),
)


def printable(text: str) -> str:
    r"""Return ``text`` with control characters, bidirectional overrides and lone surrogates written as ``\x1b``.

    Newlines and tabs stay; a carriage return before a newline goes.
    """
    return _CONTROL.sub(_escape, text.replace("\r\n", "\n"))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def redacted(text: str) -> str:
    """Return ``text`` without users and passwords of URLs, tokens, and values of environment variables with secrets."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    for value in sorted(_secret_values(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text


def _secret_values() -> Iterator[str]:
    """Yield the values of variables whose names say that they are secret, and passwords of URLs in any variable."""
    for name in list(os.environ):
        value = os.environ.get(name, "")  # another thread may have removed it
        if len(value) >= MIN_SECRET and _SECRET_NAME.search(name):
            yield value
        elif "://" in value and "@" in value:
            password = _password(value)
            if len(password) >= MIN_SECRET // 2:
                yield from {password, unquote(password)}


def _password(url: str) -> str:
    try:
        return urlsplit(url).password or ""
    except ValueError:  # no URL
        return ""


def shown(text: str) -> str:
    """Return ``text`` as it may be shown: without secrets, and printable."""
    return printable(redacted(text))


def one_line(text: str) -> str:
    r"""Return ``text`` as it may be shown in one line: newlines become ``\n``, or a space before an indented line."""
    return shown(text).replace("\n  ", " ").replace("\n", "\\n").replace("\t", " ")


def without_secrets(value: Any) -> Any:  # Any: plain data, as JSON has it
    """Return plain data with every text in it redacted, keys too."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {without_secrets(key): without_secrets(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in value]
    return value
