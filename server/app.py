"""The routes and the life of the server: aiohttp, one process; a small request is answered inline, without a thread."""

import asyncio
import logging
import signal
import sys
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
from aiohttp import web

from server import identity, protocol, tensors
from server.jobs import BadJob, Jobs
from server.models.base import BadInput, Model
from server.stats import Stats, Times

VERSION = "1"
BODY_LIMIT = 16 * 2**20
INLINE_BODY = 32 * 2**10  # a larger one would keep other requests waiting for a millisecond or more
PACK_FROM = 1024  # bytes; a smaller answer fits into one packet anyway
WBITS = {"gzip": 31, "deflate": 15}
EXTENSIONS = ["binary_tensor_data", "statistics", "model_configuration", "model_repository"]
NOT_OFFERED = {
    "/v2/{kind:(system|cuda|tpu|xpu)sharedmemory}{rest:(/.*)?}": "shared memory",
    "/v2/trace/setting": "tracing",
    "/v2/models/{model}/trace/setting": "tracing",
    "/v2/logging": "a change of logging",
}
KEEP_ALIVE_S = 75.0
GRACE_S = 2.0
BACKLOG = 1024
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def log(line: str) -> None:
    print(f"server: {line}", file=sys.stderr, flush=True)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        log(" ".join(f"{record.getMessage()}{f': {cause!r}' if cause else ''}".split()))


def log_in_lines() -> None:
    """Let what aiohttp and asyncio log be one line each, too."""
    logging.basicConfig(level=logging.WARNING, handlers=[_Lines()])


def answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def refusal(status: int, text: str) -> web.Response:
    return answer({"error": " ".join(text.split())}, status)


def packed(body: bytes, accepted: str) -> tuple[bytes, str | None]:
    """The body as gzip or deflate, where the header Accept-Encoding takes one of them."""
    for one in accepted.lower().split(",") if len(body) >= PACK_FROM else ():
        name, _, weight = one.replace(" ", "").partition(";q=")
        if name in WBITS and (not weight or weight.strip("0.")):
            packer = zlib.compressobj(1, wbits=WBITS[name])
            return packer.compress(body) + packer.flush(), name
    return body, None


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error is {"error": "..."} and nothing else, also those that aiohttp raises."""
    try:
        return await handler(request)
    except BadInput as error:
        return refusal(400, str(error))
    except web.RequestPayloadError as error:
        return refusal(400, f"the body could not be read: {error}")
    except web.HTTPRequestEntityTooLarge:
        return refusal(413, f"wanted a body of at most {BODY_LIMIT} bytes; found a larger one")
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        refused = refusal(405, f"{request.path} takes {allowed}; found {request.method}")
        refused.headers["Allow"] = allowed
        return refused
    except web.HTTPException as error:
        return refusal(error.status, f"{error.reason}: {request.method} {request.path}")
    except protocol.NotOffered as error:
        return refusal(501, str(error))
    except _Refused as error:
        return refusal(error.status, str(error))
    except Exception as error:
        mark = uuid.uuid4().hex[:8]
        log(f"error {mark}: {request.method} {request.path}: {type(error).__name__}: {' '.join(str(error).split())}")
        return refusal(500, f"the request failed inside the server; its log has it as error {mark}")


async def expectation(request: web.Request) -> web.Response | None:
    """Answer the header Expect, in place of aiohttp's own, whose refusal is no JSON."""
    if request.headers["Expect"].lower() != "100-continue":
        return refusal(417, f"wanted 100-continue for the header Expect; found {request.headers['Expect']!r}")
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the answer itself has not begun
    return None


class Connection(web.RequestHandler):
    """One client's connection. What is no HTTP reaches no route, so its refusal is made here."""

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the connection broke in the middle of an answer")
        refused = refusal(status, f"the request could not be read: {message or exc or 'no reason was given'}")
        refused.force_close()
        return refused


class Service:
    """The handlers, over the models that are served."""

    def __init__(self, models: Sequence[Model], label: str | None, jobs: Jobs | None) -> None:
        self._models = {model.name: model for model in models}
        self._loaded = set(self._models)
        self._stats = {(model.name, version): Stats() for model in models for version in model.versions}
        self._label = label
        self._jobs = jobs
        self._digest: asyncio.Task[tuple[str | None, str]] | None = None
        # One thread, so that the memory that large bodies take is bounded.
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large")

    def application(self) -> web.Application:
        app = web.Application(middlewares=[errors_as_json], client_max_size=BODY_LIMIT)

        def add(method: str, path: str, handler: Handler) -> None:
            app.router.add_route(method, path, handler, expect_handler=expectation)

        add("GET", "/v2/health/live", self._live)
        add("GET", "/v2/health/ready", self._ready)
        add("GET", "/v2", self._server)
        add("GET", "/v2/models/stats", self._all_stats)
        for version in ("", "/versions/{version}"):
            path = "/v2/models/{model}" + version
            add("POST", path + "/infer", self._infer)
            add("GET", path + "/ready", self._model_ready)
            add("GET", path + "/config", self._config)
            add("GET", path + "/stats", self._model_stats)
            add("GET", path, self._model)
        add("POST", "/v2/repository/index", self._index)
        add("POST", "/v2/repository/models/{model}/load", self._load)
        add("POST", "/v2/repository/models/{model}/unload", self._unload)
        for path, what in NOT_OFFERED.items():
            add("*", path, _not_offered(what))
        add("GET", "/identity", self._identity)
        add("POST", "/jobs", self._start_job)
        add("GET", "/jobs/{id}", self._job)
        app.on_shutdown.append(self._stop)
        return app

    async def _live(self, request: web.Request) -> web.Response:
        return answer({"live": True})

    async def _ready(self, request: web.Request) -> web.Response:
        return answer({"ready": True})  # models are loaded before the server listens

    async def _server(self, request: web.Request) -> web.Response:
        return answer({"name": "isolatency", "version": VERSION, "extensions": EXTENSIONS})

    async def _model(self, request: web.Request) -> web.Response:
        return answer(protocol.metadata(self._named(request)))

    async def _model_ready(self, request: web.Request) -> web.Response:
        return answer({"name": self._named(request).name, "ready": True})

    async def _config(self, request: web.Request) -> web.Response:
        return answer(protocol.config(self._named(request)))

    async def _model_stats(self, request: web.Request) -> web.Response:
        model = self._named(request)
        named = request.match_info.get("version")
        return answer(self._stats_of((model.name, v) for v in model.versions if named in (None, v)))

    async def _all_stats(self, request: web.Request) -> web.Response:
        return answer(self._stats_of(key for key in self._stats if key[0] in self._loaded))

    def _stats_of(self, keys: Iterable[tuple[str, str]]) -> dict[str, Any]:
        return {"model_stats": [self._stats[key].as_triton(*key) for key in keys]}

    async def _index(self, request: web.Request) -> web.Response:
        ready_only = (await _object(request)).get("ready", False)
        if not isinstance(ready_only, bool):
            raise BadInput(f"wanted true or false for ready; found {tensors.short(ready_only)}")
        listed = []
        for model in self._models.values():
            loaded = model.name in self._loaded
            state = {"state": "READY", "reason": ""} if loaded else {"state": "UNAVAILABLE", "reason": "unloaded"}
            listed += [{"name": model.name, "version": version} | state for version in model.versions]
        return answer([one for one in listed if one["state"] == "READY" or not ready_only])

    async def _load(self, request: web.Request) -> web.Response:
        """Load again a model that was named at the start; what is loaded stays as it is."""
        model = self._known(request)
        if (await _object(request)).get("parameters"):
            raise BadInput("a model is loaded as it was named at the start; found parameters that would change it")
        if model.name not in self._loaded:
            await asyncio.get_running_loop().run_in_executor(self._large, model.load)
            self._loaded.add(model.name)
        return answer({})

    async def _unload(self, request: web.Request) -> web.Response:
        """Stop serving a model; its memory is kept, since it may be loaded again."""
        model = self._known(request)
        await _object(request)
        self._loaded.discard(model.name)
        return answer({})

    async def _infer(self, request: web.Request) -> web.Response:
        model = self._named(request)
        version = request.match_info.get("version", model.versions[-1])
        stats = self._stats[model.name, version]
        begun = time.monotonic_ns()
        try:
            encoding = request.headers.get("Content-Encoding", "identity")
            if encoding.lower() not in ("identity", *WBITS):
                raise _Refused(f"wanted gzip, deflate or identity for Content-Encoding; found {encoding!r}", 415)
            body = await request.read()
            header = request.headers.get("Inference-Header-Content-Length")
            asked = (model, version, body, header, request.headers.get("Accept-Encoding", ""))
            if len(body) <= INLINE_BODY:
                headers, results, times = _predict(*asked)
            else:
                loop = asyncio.get_running_loop()
                headers, results, times = await loop.run_in_executor(self._large, _predict, *asked)
        except BaseException:
            stats.failed(time.monotonic_ns() - begun)
            raise
        stats.succeeded(time.monotonic_ns() - begun, times)
        return web.Response(body=results, headers=headers)

    def _named(self, request: web.Request) -> Model:
        model = self._known(request)
        if model.name not in self._loaded:
            raise _Refused(f"model {model.name!r} is unloaded; load it first", status=503)
        return model

    def _known(self, request: web.Request) -> Model:
        name, version = request.match_info["model"], request.match_info.get("version")
        model = self._models.get(name)
        if model is None:
            raise _Refused(f"model {name!r} is not served; there are: {', '.join(self._models)}")
        if version is not None and version not in model.versions:
            raise _Refused(f"model {name!r} has no version {version!r}; there are: {', '.join(model.versions)}")
        return model

    async def _identity(self, request: web.Request) -> web.Response:
        if self._digest is None:
            self._digest = asyncio.create_task(self._digest_of_this_tree())
        return answer(identity.facts(await asyncio.shield(self._digest)))

    async def _digest_of_this_tree(self) -> tuple[str | None, str]:
        try:
            return await asyncio.to_thread(identity.digest_of_this_tree, self._label)
        except OSError as error:
            log(f"error: the tree has no digest, since not all of it can be read: {error}")
            return None, "none"

    async def _start_job(self, request: web.Request) -> web.Response:
        jobs = self._offered()
        try:
            wanted = orjson.loads(await request.read())
        except orjson.JSONDecodeError as error:
            raise BadInput(f"wanted a JSON body; it could not be parsed: {error}") from None
        try:
            job = await jobs.prepare(wanted)
        except BadJob as error:
            return refusal(error.status, str(error))
        begun = answer(job.state(), 201)
        if request.transport is None or request.transport.is_closing():
            await job.stop()  # nobody waits for it, and it would keep others waiting
            return begun
        await begun.prepare(request)
        job.go()  # the target's clock starts as the answer leaves, so that the host's can start as it arrives
        await begun.write_eof()
        return begun

    async def _job(self, request: web.Request) -> web.Response:
        job = self._offered().find(request.match_info["id"])
        if job is None:
            raise _Refused(f"there is no job {request.match_info['id']!r}")
        if request.query.get("wait") == "1":
            await job.ended.wait()
        return answer(job.state())

    def _offered(self) -> Jobs:
        if self._jobs is None:
            raise _Refused("batch jobs are off; the server was started without --jobs", status=501)
        return self._jobs

    async def _stop(self, app: web.Application) -> None:
        if self._jobs is not None:
            await self._jobs.stop()
        self._large.shutdown(wait=False, cancel_futures=True)


def _predict(
    model: Model, version: str, body: bytes, json_bytes: str | None, accepted: str
) -> tuple[dict[str, str], bytes, Times]:
    start = time.monotonic_ns()
    wanted = protocol.parse(body, model, json_bytes)
    parsed = time.monotonic_ns()
    batch = wanted.batch()
    results = model.predict(batch)
    computed = time.monotonic_ns()
    protocol.check_results(model, batch, results)
    made = protocol.response(model, version, wanted, results)
    content, encoding = packed(made.body, accepted)
    headers = {"Content-Type": "application/json"}
    if made.json_bytes is not None:
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(made.json_bytes)}
    if encoding is not None:
        headers["Content-Encoding"] = encoding
    return headers, content, Times(parsed - start, computed - parsed, time.monotonic_ns() - computed)


async def _object(request: web.Request) -> dict[str, Any]:
    """The JSON object in the body, or an empty one where there is no body."""
    body = await request.read()
    try:
        found = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise BadInput(f"wanted a JSON body; it could not be parsed: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f"wanted a JSON object; found {tensors.kind(found)}")
    return found


def _not_offered(what: str) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        raise protocol.NotOffered(f"{what} is not offered by this server")

    return handler


class _Refused(Exception):
    """What a path names is not here: a model, a version, a job, or jobs at all."""

    def __init__(self, text: str, status: int = 404) -> None:
        super().__init__(text)
        self.status = status


async def serve(service: Service, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError when the address cannot be listened on."""
    loop = asyncio.get_running_loop()
    runner = web.AppRunner(service.application(), shutdown_timeout=GRACE_S)
    await runner.setup()
    manager = runner.server
    assert manager is not None

    def connection() -> Connection:
        return Connection(manager, loop=loop, keepalive_timeout=KEEP_ALIVE_S, access_log=None)  # type: ignore[arg-type]

    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    try:
        listener = await loop.create_server(connection, host, port, backlog=BACKLOG)
        bound = listener.sockets[0].getsockname()
        log(f"listening on http://{f'[{bound[0]}]' if ':' in bound[0] else bound[0]}:{bound[1]}")
        await end.wait()
        log("stopping")
        listener.close()
    finally:
        await runner.cleanup()
    log("stopped")
