"""What the server says, on standard error: one line per start, stop and error, as text or JSON."""

import datetime
import logging
import sys

import orjson

FORMATS = ("text", "json")
_as_json = False


def log(line: str, level: str = "info") -> None:
    line = " ".join(line.split())
    text = f"server: {line}"
    if _as_json:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        text = orjson.dumps({"time": now, "level": level, "message": line}).decode()
    print(text, file=sys.stderr, flush=True)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        log(f"{record.getMessage()}{f': {cause!r}' if cause else ''}", record.levelname.lower())


def in_lines(form: str) -> None:
    """Let everything be one line each, also what aiohttp and asyncio log."""
    global _as_json
    _as_json = form == "json"
    logging.basicConfig(level=logging.WARNING, handlers=[_Lines()])


def access() -> logging.Logger:
    """The log of every request, which is off unless asked for."""
    logger = logging.getLogger("aiohttp.access")
    logger.setLevel(logging.INFO)
    return logger
