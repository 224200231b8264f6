"""The routes: the Open Inference Protocol, what this target is, batch jobs, metrics."""

import asyncio
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import orjson
from aiohttp import hdrs, web
from multidict import istr

from server import identity, protocol, tensors
from server.answers import WBITS, Answer, TooLarge, answer, packed, refusal, unpacked
from server.batcher import Batcher, Busy, Call, Expired, Failed
from server.connection import Connection, Connections
from server.jobs import BadJob, Jobs
from server.limits import Limits
from server.log import log
from server.metrics import Calls, Exposition, Requests
from server.models.base import BadInput, Model
from server.timing import header, stages
from server.worker import Overdue, Watch

VERSION = "1"

INLINE_BODY = 32 * 2**10  # to parse a larger one would keep other requests waiting for a millisecond or more
EXTENSIONS = ["binary_tensor_data", "statistics", "model_configuration", "model_repository"]
NOT_OFFERED = {
    "/v2/{kind}sharedmemory{rest}": "shared memory",
    "/v2/trace/setting": "tracing",
    "/v2/models/{model}/trace/setting": "tracing",
    "/v2/logging": "a change of logging",
}
PATTERNS = {"kind": "(?:system|cuda|tpu|xpu)", "rest": "(?:/.*)?"}
JSON_BYTES: str = istr("Inference-Header-Content-Length")
CLIENT_GONE = 499  # in the counters; nobody reads such an answer
RETRY = {"Retry-After": "1"}
Parts = dict[str, str]
Handler = Callable[[web.BaseRequest, Parts, bytes], Awaitable[web.StreamResponse]]


class _Refused(Exception):
    """What is asked for is not here, or not now: a model, a version, a job."""

    def __init__(self, text: str, status: int = 404) -> None:
        super().__init__(text)
        self.status = status


class _NotAllowed(Exception):
    def __init__(self, text: str, allowed: str) -> None:
        super().__init__(text)
        self.allowed = allowed


class _Served:
    """A model, its queue, its counters."""

    def __init__(self, model: Model, limits: Limits, watch: Watch) -> None:
        self.model = model
        self.loaded = True
        self.calls = Calls()
        self.requests = {version: Requests(self.calls) for version in model.versions}
        #: An answer to one row is.
        self.small = (
            all(min(one.shape[1:], default=1) > 0 for one in model.outputs)
            and sum(8 * math.prod(one.shape[1:]) for one in model.outputs) < INLINE_BODY
        )
        self.batcher = Batcher(model, limits, watch, self.calls)


class Service:
    """The handlers, over the models that are served."""

    def __init__(
        self, models: Sequence[Model], limits: Limits, *, label: str | None, jobs: Jobs | None, timing: bool
    ) -> None:
        tensors.no_warnings()
        watch = self._watch = Watch()
        self._served = {model.name: _Served(model, limits, watch) for model in models}
        self._limits, self._label, self._jobs, self._timing = limits, label, jobs, timing
        self._most = limits.max_body_mib * 2**20
        self._metrics = Exposition()
        self._metrics.calls = {name: one.calls for name, one in self._served.items()}
        self._metrics.requests = {
            (name, version): found for name, one in self._served.items() for version, found in one.requests.items()
        }
        self.connections = Connections(limits, self._metrics)
        self._digest: asyncio.Task[tuple[str | None, str]] | None = None
        # One thread, so that the memory that large bodies take is bounded.
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large", initializer=tensors.no_warnings)
        self._routes: list[tuple[re.Pattern[str], str, Handler]] = []
        self._route()
        self._infer_paths = {
            f"/v2/models/{name}{version}/infer": (one, version.rpartition("/")[2] or one.model.versions[-1])
            for name, one in self._served.items()
            for version in ("", *(f"/versions/{version}" for version in one.model.versions))
        }

    def warm_up(self) -> None:
        for name, one in self._served.items():
            if (wrong := one.batcher.warm_up()) is not None:
                log(f"model {name} failed in its first calls and is served all the same: {wrong}", "error")

    def _route(self) -> None:
        def add(method: str, path: str, handler: Handler) -> None:
            parts = re.sub(r"\{(\w+)\}", lambda part: f"(?P<{part[1]}>{PATTERNS.get(part[1], '[^/]+')})", path)
            self._routes.append((re.compile(parts), method, handler))

        add("GET", "/v2/health/live", self._live)
        add("GET", "/v2/health/ready", self._ready)
        add("GET", "/v2", self._server)
        add("GET", "/metrics", self._exposition)
        add("GET", "/v2/models/stats", self._all_stats)
        for version in ("", "/versions/{version}"):
            path = "/v2/models/{model}" + version
            add("POST", path + "/infer", self._infer_by_name)
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

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            if hdrs.EXPECT in request.headers:
                self._continue(request)
            infer = self._infer_paths.get(request.path)
            if infer is not None and request.method == "POST":
                return await self._infer(request, *infer)
            handler, parts = self._find(request)
            body = await self._body(request)
            _connection(request).whole()
            return await handler(request, parts, body)
        except Exception as error:
            return self._refuse(request, error)

    def _continue(self, request: web.BaseRequest) -> None:
        """Answer the header Expect."""
        if request.headers["Expect"].lower() != "100-continue":
            raise _Refused(f"wanted 100-continue for the header Expect; found {request.headers['Expect']!r}", 417)
        if (request.content_length or 0) > self._most:
            raise TooLarge  # before it is sent
        if request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def _body(self, request: web.BaseRequest) -> bytes:
        coding = request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
        if coding != "identity" and coding not in WBITS:
            raise _Refused(f"wanted gzip, deflate or identity for Content-Encoding; found {coding!r}", 415)
        content = request.content
        if content.is_eof() and content.total_bytes <= INLINE_BODY:  # all of it is here, so nothing needs to be awaited
            body = content.read_nowait()
        else:
            body = await self._arrived(request)
        if coding == "identity":
            return body
        loop = asyncio.get_running_loop()
        body = await loop.run_in_executor(self._large, unpacked, body, coding, self._most)
        _connection(request).hold(len(body))
        return body

    async def _arrived(self, request: web.BaseRequest) -> bytes:
        if request.content_length is not None and request.content_length > self._most:
            raise TooLarge
        _connection(request).expect_more()
        body = bytearray()
        while piece := await request.content.readany():
            body += piece
            if len(body) > self._most:
                raise TooLarge
            _connection(request).hold(len(piece))
        return bytes(body)

    def _refuse(self, request: web.BaseRequest, error: BaseException) -> Answer:
        """Every error is {"error": "…"} and nothing else."""
        refused = self._refusal(request, error)
        self._metrics.errors[refused.status] += 1
        if not request.content.is_eof():  # the rest of its body is not read
            refused.force_close()
        _connection(request).whole()
        return refused

    def _find(self, request: web.BaseRequest) -> tuple[Handler, Parts]:
        for pattern, method, handler in self._routes:
            if match := pattern.fullmatch(request.path):
                if method not in ("*", request.method):
                    raise _NotAllowed(f"{request.path} takes {method}; found {request.method}", method)
                return handler, match.groupdict()
        raise _Refused(f"there is nothing at {request.path}")

    def _refusal(self, request: web.BaseRequest, error: BaseException) -> Answer:
        match error:
            case BadInput():
                return refusal(400, str(error))
            case BadJob() | _Refused():
                return refusal(error.status, str(error))
            case Busy() | Expired():
                return refusal(503, str(error), RETRY)
            case _NotAllowed():
                return refusal(405, str(error), {"Allow": error.allowed})
            case protocol.NotOffered():
                return refusal(501, str(error))
            case TooLarge():
                return refusal(413, f"wanted a body of at most {self._limits.max_body_mib} MiB; found a larger one")
            case web.RequestPayloadError():
                return refusal(400, f"the body could not be read: {error}")
            case ConnectionError():
                return refusal(CLIENT_GONE, "the client is gone")
        mark = uuid.uuid4().hex[:8]
        reason = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
        log(f"error {mark}: {request.method} {request.path}: {reason}", "error")
        return refusal(500, f"the request failed inside the server; its log has it as error {mark}")

    async def _live(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        return answer({"live": True})

    async def _ready(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        if self.connections.stopping:
            raise _Refused("the server is stopping", 503)
        return answer({"ready": True})  # models are loaded before the server listens

    async def _server(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        return answer({"name": "isolatency", "version": VERSION, "extensions": EXTENSIONS})

    async def _exposition(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        self._metrics.waiting = {name: one.batcher.waiting_rows for name, one in self._served.items()}
        self._metrics.connections = len(self.connections.open)
        content, media = self._metrics.text(request.headers.get("Accept", ""))
        return Answer(content, media=media)

    async def _model(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        return answer(protocol.metadata(self._named(parts).model))

    async def _model_ready(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        return answer({"name": self._named(parts).model.name, "ready": True})

    async def _config(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        found = self._named(parts)
        batcher = found.batcher
        measured = {
            str(rows): {"us": us, "runs": "inline" if batcher.inline(rows) else "in a thread"}
            for rows, us in batcher.costs.as_us().items()
        }
        ours = {
            "max_batch": str(self._limits.max_batch if batcher.joins else 1),
            "max_delay_us": str(self._limits.max_delay_us),
            "max_queue": str(self._limits.max_queue),
            "calls_by_rows": orjson.dumps(measured).decode(),
        }
        told = protocol.config(found.model)
        told["parameters"] |= {name: {"string_value": value} for name, value in ours.items()}
        return answer(told)

    async def _model_stats(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        model, named = self._named(parts).model, parts.get("version")
        return answer(self._stats_of((model.name, v) for v in model.versions if named in (None, v)))

    async def _all_stats(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        return answer(self._stats_of(key for key in self._metrics.requests if self._served[key[0]].loaded))

    def _stats_of(self, keys: Iterable[tuple[str, str]]) -> dict[str, Any]:
        return {"model_stats": [self._metrics.requests[key].as_triton(*key) for key in keys]}

    async def _index(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        ready_only = _object(body).get("ready", False)
        if not isinstance(ready_only, bool):
            raise BadInput(f"wanted true or false for ready; found {tensors.short(ready_only)}")
        listed = []
        for name, one in self._served.items():
            state = {"state": "READY", "reason": ""} if one.loaded else {"state": "UNAVAILABLE", "reason": "unloaded"}
            listed += [{"name": name, "version": version} | state for version in one.model.versions]
        return answer([one for one in listed if one["state"] == "READY" or not ready_only])

    async def _load(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        """Load again a model that was named at the start; what is loaded stays as it is."""
        found = self._known(parts)
        if _object(body).get("parameters"):
            raise BadInput("a model is loaded as it was named at the start; found parameters that would change it")
        if not found.loaded:
            await found.batcher.aside(found.model.load)
            found.loaded = True
        return answer({})

    async def _unload(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        """Stop serving a model; its memory is kept, since it may be loaded again."""
        found = self._known(parts)
        _object(body)
        found.loaded = False
        return answer({})

    async def _infer_by_name(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        """An infer request whose path is not spelt as the fast look-up knows it."""
        found = self._named(parts)
        return await self._infer(request, found, parts.get("version", found.model.versions[-1]))

    async def _infer(self, request: web.BaseRequest, served: _Served, version: str) -> Answer:
        connection = _connection(request)
        counts = served.requests[version]
        begun = time.monotonic_ns()
        try:
            if not served.loaded:
                raise _Refused(f"model {served.model.name!r} is unloaded; load it first", 503)
            headers = request.headers
            body = await self._body(request)
            begun = connection.whole()
            read = time.monotonic_ns()
            json_bytes = headers.get(JSON_BYTES)
            large = len(body) > INLINE_BODY
            if large:
                loop = asyncio.get_running_loop()
                wanted = await loop.run_in_executor(self._large, protocol.parse, body, served.model, json_bytes)
                if request.transport is None:
                    raise ConnectionResetError
            else:
                wanted = protocol.parse(body, served.model, json_bytes)
            try:
                self._watch.run(served.model.check, wanted.parameters)
            except Overdue:  # it may be the machine that was late
                await served.batcher.aside(lambda: served.model.check(wanted.parameters))
            call = Call(wanted, time.monotonic_ns())
            connection.waiting = call
            if not served.batcher.at_once(call, others=self.connections.others(call.parsed_ns)):
                await served.batcher.wait(call)
            connection.waiting = None
            if call.error is not None:
                raise call.error
            resumed = time.monotonic_ns()
            accepted = headers.get(hdrs.ACCEPT_ENCODING, "")
            small = call.rows == 1 and served.small
            if large or (not small and sum(values.nbytes for values in call.results.values()) > INLINE_BODY):
                loop = asyncio.get_running_loop()
                content, more, media = await loop.run_in_executor(
                    self._large, _serialised, served.model, version, call, accepted
                )
            else:
                content, more, media = _serialised(served.model, version, call, accepted)
            if len(content) > INLINE_BODY:
                connection.release()  # the request has no further use
                connection.hold(len(content))
        except (Exception, SystemExit) as error:  # a model's check may try to end the program
            refused = self._refuse(request, error)
            counts.failed(refused.status, time.monotonic_ns() - begun)
            return refused
        except asyncio.CancelledError:  # its rows are out of the queue, too
            counts.failed(CLIENT_GONE, time.monotonic_ns() - begun)
            raise
        serialised = time.monotonic_ns()
        of = stages(begun, read, call.parsed_ns, call.started_ns, call.joined_ns, call.computed_ns, resumed, serialised)
        counts.succeeded(call.rows, of)
        if self._timing:
            more["Server-Timing"] = header(of)
        answered = Answer(content, headers=more, media=media)
        answered.written = lambda: counts.write.add(time.monotonic_ns() - serialised)
        return answered

    def _named(self, parts: Parts) -> _Served:
        found = self._known(parts)
        if not found.loaded:
            raise _Refused(f"model {found.model.name!r} is unloaded; load it first", 503)
        return found

    def _known(self, parts: Parts) -> _Served:
        name, version = parts["model"], parts.get("version")
        found = self._served.get(name)
        if found is None:
            raise _Refused(f"model {name!r} is not served; there are: {', '.join(self._served)}")
        if version is not None and version not in found.model.versions:
            versions = ", ".join(found.model.versions)
            raise _Refused(f"model {name!r} has no version {version!r}; there are: {versions}")
        return found

    async def _identity(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        if self._digest is None:
            self._digest = asyncio.create_task(self._digest_of_this_tree())
        return answer(identity.facts(await asyncio.shield(self._digest)))

    async def _digest_of_this_tree(self) -> tuple[str | None, str]:
        try:
            return await asyncio.to_thread(identity.digest_of_this_tree, self._label)
        except OSError as error:
            log(f"error: the tree has no digest, since not all of it can be read: {error}", "error")
            return None, "none"

    async def _start_job(self, request: web.BaseRequest, parts: Parts, body: bytes) -> web.StreamResponse:
        jobs = self._offered()
        job = await jobs.prepare(_json(body))
        begun = answer(job.state(), 201)
        if request.transport is None or request.transport.is_closing():
            await job.stop()  # nobody waits for it, and it would keep others waiting
            return begun
        # The target's clock starts as the answer leaves, so that the host's can start as it arrives.
        begun.written = job.go
        return begun

    async def _job(self, request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        job = self._offered().find(parts["id"])
        if job is None:
            raise _Refused(f"there is no job {parts['id']!r}")
        if request.query.get("wait") == "1":
            await job.ended.wait()
        return answer(job.state())

    def _offered(self) -> Jobs:
        if self._jobs is None:
            raise _Refused("batch jobs are off; the server was started without --jobs", 501)
        return self._jobs

    async def stop_jobs(self) -> None:
        if self._jobs is not None:
            await self._jobs.stop()

    def stop(self) -> None:
        self._large.shutdown(wait=False, cancel_futures=True)


def _connection(request: web.BaseRequest) -> Connection:
    return cast(Connection, request.protocol)


def _serialised(model: Model, version: str, call: Call, accepted: str) -> tuple[bytes, dict[str, str], str]:
    """The answer's body, headers and media type."""
    made = protocol.response(model, version, call.request, call.results)
    content, encoding = packed(made.body, accepted)
    headers, media = {}, "application/json"
    if made.json_bytes is not None:
        headers, media = {JSON_BYTES: str(made.json_bytes)}, "application/octet-stream"
    if encoding is not None:
        headers["Content-Encoding"] = encoding
    return content, headers, media


def _json(body: bytes) -> Any:
    """What a small body says; large ones would keep the event loop."""
    if len(body) > INLINE_BODY:
        raise BadInput(f"wanted a body of at most {INLINE_BODY} bytes here; found {len(body)}")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"wanted a JSON body; it could not be parsed: {error}") from None


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object in the body, or an empty one where there is no body."""
    found = _json(body) if body else {}
    if not isinstance(found, dict):
        raise BadInput(f"wanted a JSON object; found {tensors.kind(found)}")
    return found


def _not_offered(what: str) -> Handler:
    async def handler(request: web.BaseRequest, parts: Parts, body: bytes) -> Answer:
        raise protocol.NotOffered(f"{what} is not offered by this server")

    return handler
