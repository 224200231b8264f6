"""The floor of an aiohttp inference server: one routed handler that does the JSON work and calls the model, no more.

python -m tests.bench.bare_server MODEL PORT
"""

import argparse
import asyncio
import sys

import numpy as np
import orjson
import uvloop
from aiohttp import web

from server import catalogue
from server.models.base import Batch

HEADERS = {"Content-Type": "application/json"}


def application(name: str) -> web.Application:
    parser = argparse.ArgumentParser()
    catalogue.add_arguments(parser.add_argument)
    chosen = parser.parse_args(["--model", name])
    (model,) = catalogue.load(chosen.model, chosen)
    wanted = tuple(one.name for one in model.outputs if not one.on_request)

    async def infer(request: web.Request) -> web.Response:
        (tensor,) = orjson.loads(await request.read())["inputs"]
        x = np.array(tensor["data"], dtype=np.float32).reshape(tensor["shape"])
        results = model.predict(Batch({"x": x}, outputs=wanted))
        outputs = [
            {"name": one.name, "shape": results[one.name].shape, "datatype": one.datatype, "data": results[one.name]}
            for one in model.outputs
            if not one.on_request
        ]
        answer = {"model_name": name, "model_version": request.match_info["version"], "outputs": outputs}
        return web.Response(body=orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), headers=HEADERS)

    app = web.Application()
    app.router.add_post("/v2/models/{model}/versions/{version}/infer", infer)
    return app


async def main(name: str, port: int) -> None:
    runner = web.AppRunner(application(name), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
