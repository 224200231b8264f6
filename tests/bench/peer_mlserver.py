"""The same model in MLServer, in the serving process itself (parallel_workers 0), which is its faster way.

PEERS/bin/python -m tests.bench.peer_mlserver MODEL PORT
"""

import asyncio
import sys

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from server.models.base import Batch
from tests.bench.bare_server import Work

work = Work(sys.argv[1])


class Served(MLModel):
    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        results = work.model.predict(Batch({"x": x}, outputs=work.wanted))
        outputs = [NumpyCodec.encode_output(name, results[name]) for name in work.wanted]
        return InferenceResponse(model_name=self.name, model_version="1", outputs=outputs)


async def main(port: int) -> None:
    settings = Settings(
        host="127.0.0.1",
        http_port=port,
        grpc_port=port + 1000,
        metrics_port=port + 2000,
        parallel_workers=0,
        debug=False,
    )
    server = MLServer(settings)
    described = ModelSettings(name=work.model.name, implementation=Served, parameters={"version": "1"})
    await server.start([described])


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[2])))
