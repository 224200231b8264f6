"""Every call of tritonclient[http] against the server at HOST:PORT: `python triton_calls.py HOST:PORT DATA`.

Runs in an environment of its own, which has tritonclient and none of this project. Ends with 0 when all is right.
"""

import asyncio
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as sync
import tritonclient.http.aio as aio
from tritonclient.http.aio.auth import BasicAuth as AsyncBasicAuth
from tritonclient.http.auth import BasicAuth
from tritonclient.utils import InferenceServerException

URL, DATA = sys.argv[1], Path(sys.argv[2])
ROWS, LABELS = (np.load(DATA / "knn.npz")[name] for name in ("rows", "labels"))


def watched(kind: Any) -> Any:
    """The client, which knows what has not been asked of it yet."""
    left = {name for base in kind.__mro__[:-1] for name in vars(base) if not name.startswith("_")}

    class Watched(kind):  # type: ignore[misc]
        not_called = left

        def __getattribute__(self, name: str) -> Any:
            left.discard(name)
            return super().__getattribute__(name)

    return Watched


def tensor(values: Any, datatype: str = "FP32", binary: bool = True) -> Any:
    one = sync.InferInput("x", list(values.shape), datatype)
    one.set_data_from_numpy(values, binary_data=binary)
    return one


def refused(call: Any, *words: str) -> None:
    try:
        call()
    except InferenceServerException as error:
        assert all(word in str(error) for word in words), f"wanted {words}; found {error}"
    else:
        raise AssertionError(f"wanted a refusal with {words}")


def facts(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("knn")
    assert client.is_model_ready("knn", "1")
    assert not client.is_model_ready("ghost")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("knn", "1")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 30]}]
    assert client.get_model_config("knn", "1")["input"][0]["dims"] == [-1, 30]
    refused(lambda: client.get_model_metadata("ghost"), "404", "ghost", "knn")
    refused(lambda: client.get_model_config("ghost"), "404", "ghost")


def inference(client: Any) -> None:
    for binary_in in (True, False):
        for binary_out in (True, False, None):
            for packing in (None, "gzip", "deflate"):
                wanted = binary_out is not None and [
                    sync.InferRequestedOutput("votes", binary_data=binary_out),
                    sync.InferRequestedOutput("label", binary_data=not binary_out),
                ]
                found = client.infer(
                    "knn", [tensor(ROWS[:200], binary=binary_in)], outputs=wanted or None, request_id="one",
                    request_compression_algorithm=packing, response_compression_algorithm=packing,
                    timeout=10_000_000, priority=1,
                )  # fmt: skip
                assert np.array_equal(found.as_numpy("label"), LABELS[:200])
                assert found.as_numpy("votes").dtype == np.int64
                assert found.get_response()["id"] == "one"
    whole = client.infer("knn", [tensor(ROWS)])
    for start, stop in ((0, 1), (3, 10), (100, 400)):
        part = client.infer("knn", [tensor(ROWS[start:stop])], model_version="1")
        for name in ("label", "votes"):
            assert np.array_equal(part.as_numpy(name), whole.as_numpy(name)[start:stop])
    voters = client.infer("knn", [tensor(ROWS[:5])], parameters={"k": 1}).as_numpy("votes")
    assert voters.tolist() == [1] * 5
    handle = client.async_infer("knn", [tensor(ROWS[:7])])
    assert np.array_equal(handle.get_result().as_numpy("label"), LABELS[:7])


def datatypes(client: Any) -> None:
    types = {"BOOL": bool, "INT8": np.int8, "UINT8": np.uint8, "INT16": np.int16, "UINT16": np.uint16, "FP16": "f2"}
    for name, dtype in types.items():
        for binary in (True, False) if name != "FP16" else (True,):
            found = client.infer("null", [tensor(np.ones((3, 2), dtype), name, binary)])
            assert found.as_numpy("rows").tolist() == [1] * 3
    for name, dtype in {"INT32": "i4", "UINT32": "u4", "INT64": "i8", "UINT64": "u8", "FP64": "f8"}.items():
        refused(lambda n=name, d=dtype: client.infer("null", [tensor(np.ones((3, 2), d), n)]), "400", name, "FP32")
    texts = tensor(np.array([[b"a"]], dtype=object), "BYTES")
    refused(lambda: client.infer("null", [texts]), "400", "BYTES")


def errors(client: Any) -> None:
    x = [tensor(ROWS[:1])]
    refused(lambda: client.infer("ghost", x), "404", "ghost")
    refused(lambda: client.infer("knn", x, model_version="9"), "404", "9")
    refused(lambda: client.infer("knn", x, parameters={"k": 0}), "400", "k")
    refused(lambda: client.infer("knn", x, outputs=[sync.InferRequestedOutput("nothing")]), "400", "nothing")
    refused(lambda: client.infer("knn", [tensor(ROWS[:1] * np.float32("nan"))]), "400", "finite")
    refused(lambda: client.infer("knn", [tensor(ROWS[:0])]), "400", "1 row")
    refused(lambda: client.infer("knn", [tensor(ROWS[:1, :29].copy())]), "400", "shape")
    other = sync.InferInput("y", [1, 30], "FP32")
    other.set_data_from_numpy(ROWS[:1])
    refused(lambda: client.infer("knn", [other]), "400", "y")
    counted = sync.InferRequestedOutput("label", class_count=2)
    refused(lambda: client.infer("knn", x, outputs=[counted]), "501", "classification")
    shared = sync.InferInput("x", [1, 30], "FP32")
    shared.set_shared_memory("region", 120)
    refused(lambda: client.infer("knn", [shared]), "501", "shared memory")
    into = sync.InferRequestedOutput("label")
    into.set_shared_memory("region", 8)
    refused(lambda: client.infer("knn", x, outputs=[into]), "501", "shared memory")


def statistics(client: Any) -> None:
    def counts() -> tuple[int, int]:
        (one,) = client.get_inference_statistics("knn", "1")["model_stats"]
        assert one["inference_stats"]["compute_infer"]["ns"] > 0
        assert one["inference_count"] == one["execution_count"] == one["inference_stats"]["queue"]["count"]
        return one["inference_stats"]["success"]["count"], one["inference_stats"]["fail"]["count"]

    before = counts()
    client.infer("knn", [tensor(ROWS[:3])])
    refused(lambda: client.infer("knn", [tensor(ROWS[:0])]), "400")
    assert counts() == (before[0] + 1, before[1] + 1)
    assert {one["name"] for one in client.get_inference_statistics()["model_stats"]} == {"knn", "dnn", "null"}


def repository(client: Any) -> None:
    def states() -> dict[str, str]:
        return {one["name"]: one["state"] for one in client.get_model_repository_index()}

    assert states() == dict.fromkeys(("knn", "dnn", "null"), "READY")
    client.unload_model("null")
    assert states()["null"] == "UNAVAILABLE"
    assert not client.is_model_ready("null")
    refused(lambda: client.infer("null", [tensor(ROWS[:1])]), "503", "null")
    client.load_model("null")
    assert client.is_model_ready("null")
    assert states()["null"] == "READY"
    refused(lambda: client.load_model("ghost"), "404", "ghost")
    refused(lambda: client.unload_model("../ghost"), "404")
    refused(lambda: client.load_model("knn", config='{"name": "knn"}'), "400", "start")


def parts(client: Any) -> None:
    """A request's body made by the client, sent by hand, and its answer read by the client."""
    outputs = [sync.InferRequestedOutput("votes"), sync.InferRequestedOutput("label", binary_data=False)]
    body, size = client.generate_request_body([tensor(ROWS[:9])], outputs=outputs, request_id="by hand")
    line = HTTPConnection(URL, timeout=60)
    line.request("POST", "/v2/models/knn/infer", body, {"Inference-Header-Content-Length": str(size)})
    answer = line.getresponse()
    length = int(answer.headers["Inference-Header-Content-Length"])
    found = client.parse_response_body(answer.read(), header_length=length)
    line.close()
    assert np.array_equal(found.as_numpy("label"), LABELS[:9])
    assert found.as_numpy("votes").shape == (9,)
    assert found.get_output("label")["datatype"] == "INT64"
    assert found.as_numpy("nothing") is None


def plugin(client: Any) -> None:
    client.register_plugin(BasicAuth("user", "word"))
    assert client.plugin() is not None
    assert client.is_server_live()
    client.unregister_plugin()


def refusals(client: Any) -> dict[str, list[Any]]:
    return {
        "shared memory": [
            client.get_system_shared_memory_status, client.get_cuda_shared_memory_status,
            lambda: client.get_system_shared_memory_status("r"), lambda: client.get_cuda_shared_memory_status("r"),
            lambda: client.register_system_shared_memory("r", "/r", 8),
            lambda: client.register_cuda_shared_memory("r", b"", 0, 8),
            client.unregister_system_shared_memory, client.unregister_cuda_shared_memory,
            lambda: client.unregister_system_shared_memory("r"), lambda: client.unregister_cuda_shared_memory("r"),
        ],
        "tracing": [
            client.get_trace_settings, lambda: client.get_trace_settings("knn"),
            lambda: client.update_trace_settings("knn", {"trace_rate": "1"}),
            lambda: client.update_trace_settings(settings={"trace_rate": "1"}),
        ],
        "logging": [client.get_log_settings, lambda: client.update_log_settings({"log_info": True})],
    }  # fmt: skip


def not_offered(client: Any) -> None:
    for words, asked in refusals(client).items():
        for call in asked:
            refused(call, "501", words)


async def asynchronous() -> None:
    async with watched(aio.InferenceServerClient)(URL) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("knn")
        assert (await client.get_server_metadata())["name"] == "isolatency"
        assert (await client.get_model_metadata("knn"))["name"] == "knn"
        assert (await client.get_model_config("knn"))["name"] == "knn"
        assert (await client.get_inference_statistics("knn"))["model_stats"]
        assert len(await client.get_model_repository_index()) == 3
        await client.unload_model("null")
        await client.load_model("null")

        async def ask(number: int) -> None:
            packing = (None, "gzip", "deflate")[number % 3]
            rows = slice(number, number + 1 + 10 * (number % 9))
            found = await client.infer(
                "knn", [tensor(ROWS[rows], binary=bool(number % 2))],
                request_compression_algorithm=packing, response_compression_algorithm=packing,
            )  # fmt: skip
            assert np.array_equal(found.as_numpy("label"), LABELS[rows])

        await asyncio.gather(*map(ask, range(64)))
        for words, asked in refusals(client).items():
            for call in asked:
                try:
                    await call()
                except InferenceServerException as error:
                    assert "501" in str(error), error
                    assert words in str(error), error
                else:
                    raise AssertionError("wanted a refusal")
        body, size = client.generate_request_body([tensor(ROWS[:1])])
        assert 0 < size < len(body)
        answer = b'{"outputs": [{"name": "label", "datatype": "INT64", "shape": [1], "data": [1]}]}'
        assert client.parse_response_body(answer).as_numpy("label").tolist() == [1]
        client.register_plugin(AsyncBasicAuth("user", "word"))
        assert client.plugin() is not None
        assert await client.is_server_live()
        client.unregister_plugin()
    await client.close()
    assert not client.not_called, client.not_called


def main() -> None:
    with watched(sync.InferenceServerClient)(URL, concurrency=4) as client:
        for part in (facts, inference, datatypes, errors, statistics, repository, parts, plugin, not_offered):
            part(client)
            print(f"{part.__name__}: right")
    client.close()
    assert not client.not_called, client.not_called
    asyncio.run(asynchronous())
    print("asynchronous: right")


if __name__ == "__main__":
    main()
