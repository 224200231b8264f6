"""The floor of an aiohttp inference server: one routed handler that does the JSON work and calls the model, no more.

python -m tests.bench.bare_server MODEL PORT
"""

import argparse
import asyncio
import sys
from typing import Any

import numpy as np
import orjson

from server import catalogue
from server.models.base import Batch


class Work:
    """What every server of the comparison does with a request's body."""

    def __init__(self, word: str) -> None:
        parser = argparse.ArgumentParser()
        catalogue.add_arguments(parser.add_argument)
        chosen = parser.parse_args(["--model", word])
        (self.model,) = catalogue.load(chosen.model, chosen)
        self.wanted = tuple(one.name for one in self.model.outputs if not one.on_request)

    def __call__(self, body: bytes) -> dict[str, Any]:
        (tensor,) = orjson.loads(body)["inputs"]
        x = np.array(tensor["data"], dtype=np.float32).reshape(tensor["shape"])
        results = self.model.predict(Batch({"x": x}, outputs=self.wanted))
        outputs = [
            {"name": one.name, "shape": results[one.name].shape, "datatype": one.datatype, "data": results[one.name]}
            for one in self.model.outputs
            if one.name in self.wanted
        ]
        return {"model_name": self.model.name, "model_version": "1", "outputs": outputs}


async def main(word: str, port: int) -> None:
    from aiohttp import web

    work, headers = Work(word), {"Content-Type": "application/json"}

    async def infer(request: web.Request) -> web.Response:
        found = work(await request.read())
        return web.Response(body=orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY), headers=headers)

    app = web.Application()
    app.router.add_post("/v2/models/{model}/versions/{version}/infer", infer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
