"""Takes secrets out of a raw log line before it is kept. Pure; bytes in, bytes out.

Works on the text and not on parsed JSON, because what is kept is often what could not be parsed: torn lines, glued
ones, plain text. Kong itself blanks `authorization` and `proxy-authorization` only (pdk/log.lua), so cookies, API keys
and query strings are in its logs as clients sent them.
"""

import re

MARK = b"REDACTED"

# Names of headers, query parameters and fields that hold secrets, also with a prefix (`x-`, `my_`).
_NAME = (
    rb"(?:[\w-]{0,40}[-_])?(?:authorization|cookies?|set-cookie|api[-_]?keys?|apikeys?|access[-_]?keys?|tokens?|secrets?"
    rb"|passw(?:or)?d|pwd|credentials?|session[-_]?id|jwt|signature|sig)(?:[-_](?:key|token|secret|id))?"
)
# Runs of backslashes are bounded: without that a line of nothing else takes time by the square of its length.
# Token counts are no tokens: `prompt_tokens: 5` holds a number, and only text is taken out.
_RULES: tuple[tuple[re.Pattern[bytes], bytes], ...] = (
    # "name": "value", also torn, or within a string where quotes are escaped.
    (
        re.compile(rb'(?i)(\\{0,3}")(' + _NAME + rb')(\\{0,3}"\s*:\s*)(\\{0,3}")(?:(?!\4)(?:\\.|[^"\\]))*'),
        rb"\1\2\3\4" + MARK,
    ),
    # "name": ["value", ...], a header sent several times.
    (re.compile(rb'(?i)(\\{0,3}"' + _NAME + rb'\\{0,3}"\s*:\s*\[\s*)(\\{0,3}")[^\]{}]*'), rb"\1\2" + MARK + rb"\2"),
    # ?name=value and &name=value, also the short `key`, up to the end of the parameter.
    (
        re.compile(rb"(?i)([?&;]|%26|%3f|\\u0026)(" + _NAME + rb"|key|code|auth)(=|%3d)[^&\s\"'#;\\]*"),
        rb"\1\2\3" + MARK,
    ),
    # Name: value on a line of text.
    (
        re.compile(rb"(?im)(^|[\s,;{(\[])(" + _NAME + rb")(\s*[:=]\s*)(?![\s\"\\\[{]|[\d.]+\b)[^\r\n,\"}]*"),
        rb"\1\2\3" + MARK,
    ),
    # A scheme of the Authorization header, wherever it stands.
    (re.compile(rb"(?i)\b(bearer|basic|digest|apikey|hmac)(\s+)[\w.~+/=-]{8,}"), rb"\1\2" + MARK),
    # Credentials in a URL.
    (re.compile(rb"(?i)(:(?:\\?/){2})[^\s/@\"\\]+@"), rb"\1" + MARK + b"@"),
    # What looks like a key or a JSON web token by itself.
    (re.compile(rb"\b(?:spat|kpat|sk|pk|rk|ghp|xox[a-z])[_-][\w-]{12,}"), MARK),
    (re.compile(rb"\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"), MARK),
)


def redact(line: bytes) -> bytes:
    """`line` with every value that looks like a secret replaced by `MARK`; what is left stays byte for byte."""
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    return line
