"""Extracts from an exporter's error why it failed: reason, operator and line of code."""

from __future__ import annotations

import re
from collections.abc import Iterator

_COLORS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_OPERATORS = (
    re.compile(r"op='([\w.]+)'(?:, overload='(\w+)')?"),
    re.compile(r"\b(?:torch\.ops\.)?((?:aten|torchvision|quantized|prims)(?:\.|::)\w+(?:\.\w+)?)"),
)
_CALL = re.compile(r'File "([^"\n]+)", line (\d+), in \w+\n\s+([^\n]+)')
# Advice for developers of torch.
_ADVICE = re.compile(
    r"^(For |If you suspect|consider using|Caused by|The error above|The following call|\(?Refer to"
    r"|While executing|Original traceback|Use tlparse|## |---|def forward|\S+ = torch\.ops)"
    r"|https?://|[Pp]lease report|^\(?[Ss]ize-like"
)
_MOST_LINES, _MOST_LETTERS = 8, 200


def why_it_failed(error: BaseException) -> str:
    """Return an exporter's reason: its first lines, then the operator and the line of code."""
    texts = [_COLORS.sub("", str(each)) for each in _chain(error)]
    lines: dict[str, None] = {}
    for text in texts:
        for line in text.splitlines():
            plain = " ".join(line.split())
            if _ADVICE.search(plain):
                continue
            if plain and not line.startswith((" ", "\t")):
                lines[plain[:_MOST_LETTERS].rstrip(".")] = None
    found = list(lines)[:_MOST_LINES] or [type(error).__name__]
    whole = "\n".join(texts)
    operator = next((match for each in _OPERATORS if (match := each.search(whole))), None)
    if operator is not None:
        name = ".".join(part for part in operator.groups() if part)
        found.append(f"Operator: {name}")
    call = _CALL.search(whole)
    if call is not None:
        found.append(f"At {call[1]}, line {call[2]}: {call[3].strip()[:_MOST_LETTERS]}")
    return "\n".join(found)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that caused it, each once."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
