"""The same model behind FastAPI and uvicorn, the request read and the answer made as in bare_server.py.

PEERS/bin/python -m tests.bench.peer_fastapi MODEL PORT
"""

import sys

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

from tests.bench.bare_server import Work

app = FastAPI()
work = Work(sys.argv[1])


@app.post("/v2/models/{model}/versions/{version}/infer")
async def infer(model: str, version: str, request: Request) -> Response:
    return Response(
        orjson.dumps(work(await request.body()), option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
    )


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)
