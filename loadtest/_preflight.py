"""Before the first request of a test: is there a server, is it one of ours, does it have the model."""

import http.client
import json
from typing import Any

from images.errors import TargetError
from loadtest import _rows
from loadtest._connection import Address
from loadtest._encoding import EXTENSION

TIMEOUT_S = 10.0


def check(
    address: Address, model: str, width: int, encoding: str = "json", timeout_s: float = TIMEOUT_S
) -> _rows.Signature:
    """What the server says of `model`. Raises TargetError with one line unless it has it, for rows of `width`, and
    takes tensors in that encoding."""
    base = f"http://{address.authority}{address.path}"
    status, answer = _get(base, address, f"/v2/models/{model}", timeout_s)
    if status != 200:
        known, server = _get(base, address, "/v2", timeout_s)
        if 300 <= status < 400:
            raise TargetError(f"{base} redirects (status {status}); give the address that answers itself")
        if known == 200 and isinstance(server, dict) and "name" in server:
            raise TargetError(
                f"the server at {base} does not know the model {model!r} (status {status}); "
                f"choose another --model, or start it with --model {model}"
            )
        raise TargetError(
            f"the server at {base} does not speak the Open Inference Protocol: GET /v2/models/{model} "
            f"was answered {status} and GET /v2 {known}; give the address of an inference server"
        )
    try:
        found = _rows.signature(answer)
    except ValueError as error:
        raise TargetError(f"{model} at {base} cannot be asked: {error}") from error
    if found.width not in (-1, width):
        raise TargetError(
            f"{model} at {base} takes rows of {found.width} values, the query rows have {width}; see --data"
        )
    if encoding == "binary":
        _, server = _get(base, address, "/v2", timeout_s)
        if not isinstance(server, dict) or EXTENSION not in (server.get("extensions") or ()):
            raise TargetError(
                f"the server at {base} does not list the extension {EXTENSION}: ask it by JSON (--encoding json, "
                'or encoding = "json" in the plan)'
            )
    return found


def _get(base: str, address: Address, path: str, timeout_s: float) -> tuple[int, Any]:
    """Status and JSON body (None where it is no JSON). Raises TargetError when no answer comes."""
    host, port = address.sockaddr[:2]
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", address.path + path, headers={"Host": address.authority})
        answer = connection.getresponse()
        body = answer.read(1 << 20)
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise TargetError(
            f"no server answers at {base}: {reason}; start one (`isolatency up` prints its URL) or give another --host"
        ) from error
    finally:
        connection.close()
    try:
        return answer.status, json.loads(body)
    except ValueError:
        return answer.status, None
