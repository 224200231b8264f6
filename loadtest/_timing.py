"""What a server says about its own time: the header Server-Timing, in ns. Pure functions.

    Server-Timing: read;dur=0.012000, parse;dur=0.003500, …, total;dur=0.160000

Durations are in milliseconds (W3C Server Timing). An unknown server sends none, or other names: absent is -1.
"""

import io
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

STAGES = ("read", "parse", "queue", "batch", "compute", "serialise", "total")
ABSENT = -1
LONGEST_NS = 2**31 - 1  # stages are stored as int32: a longer one is stored as this

_ENTRY = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[^,]*?;[ \t]*dur[ \t]*=[ \t]*\"?([0-9]+(?:\.[0-9]*)?)")
_USUAL = b", ".join(b"%s;dur=." % name.encode() for name in STAGES) + b"\n"
_OTHERS = bytes(set(range(256)) - set(b"0123456789.,\n"))


def parse(values: Sequence[bytes]) -> NDArray[np.int64]:
    """Header values, one per answer (empty: there was none), as ns of shape (n, len(STAGES)).

    Values in the usual form are read together, which costs a tenth of reading them one by one.
    """
    found = np.full((len(values), len(STAGES)), ABSENT, dtype=np.int64)
    if not any(values):
        return found
    given = [number for number, value in enumerate(values) if value]
    text = b"\n".join(values[number] for number in given) + b"\n"
    together = _together(text, len(given))
    if together is not None:
        found[given] = together
    else:
        for number in given:
            found[number] = _one(values[number])
    return np.minimum(found, LONGEST_NS)


def _together(text: bytes, rows: int) -> NDArray[np.int64] | None:
    if text.translate(None, b"0123456789") != _USUAL * rows:
        return None
    numbers = io.BytesIO(text.translate(None, _OTHERS))
    options = pa_csv.ReadOptions(column_names=list(STAGES), use_threads=False)
    try:
        table = pa_csv.read_csv(
            numbers, options, convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(STAGES, pa.float64()))
        )
    except pa.ArrowInvalid:
        return None
    ms = np.column_stack([table[name].to_numpy() for name in STAGES])
    return None if np.isnan(ms).any() else _ns(ms)


def _one(value: bytes) -> NDArray[np.int64]:
    found = np.full(len(STAGES), ABSENT, dtype=np.int64)
    for name, ms in _ENTRY.findall(value):
        stage = name.decode("ascii")
        if stage in STAGES:
            found[STAGES.index(stage)] = _ns(np.array([float(ms)]))[0]
    return found


def _ns(ms: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(np.minimum(ms * 1e6, LONGEST_NS)).astype(np.int64)
