"""The routes and the life of the server: aiohttp, one process, models called inline."""

import asyncio
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from server import identity, protocol
from server.jobs import BadJob, Jobs
from server.models.base import BadInput, Model

VERSION = "1"
BODY_LIMIT = 16 * 2**20
KEEP_ALIVE_S = 75.0
GRACE_S = 2.0
BACKLOG = 1024
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def log(line: str) -> None:
    print(f"server: {line}", file=sys.stderr, flush=True)


def answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def refusal(status: int, text: str) -> web.Response:
    return answer({"error": text}, status)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error is {"error": "..."} and nothing else, also those that aiohttp raises."""
    try:
        return await handler(request)
    except BadInput as error:
        return refusal(400, str(error))
    except web.HTTPRequestEntityTooLarge:
        return refusal(413, f"wanted a body of at most {BODY_LIMIT} bytes; found a larger one")
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        refused = refusal(405, f"{request.path} takes {allowed}; found {request.method}")
        refused.headers["Allow"] = allowed
        return refused
    except _Refused as error:
        return refusal(error.status, error.text or "")
    except web.HTTPException as error:
        return refusal(error.status, f"{error.reason}: {request.method} {request.path}")
    except Exception as error:
        mark = uuid.uuid4().hex[:8]
        log(f"error {mark}: {request.method} {request.path}: {type(error).__name__}: {error}")
        return refusal(500, f"the request failed inside the server; its log has it as error {mark}")


class Service:
    """The handlers, over the models that are served."""

    def __init__(self, models: Sequence[Model], label: Path | None, jobs: Jobs | None) -> None:
        self._models = {model.name: model for model in models}
        self._label = label
        self._jobs = jobs
        self._digest: asyncio.Task[tuple[str | None, str]] | None = None

    def application(self) -> web.Application:
        app = web.Application(middlewares=[errors_as_json], client_max_size=BODY_LIMIT)
        add = app.router.add_route
        add("GET", "/v2/health/live", self._live)
        add("GET", "/v2/health/ready", self._live)
        add("GET", "/v2", self._server)
        for version in ("", "/versions/{version}"):
            path = "/v2/models/{model}" + version
            add("POST", path + "/infer", self._infer)
            add("GET", path + "/ready", self._model_ready)
            add("GET", path, self._model)
        add("GET", "/identity", self._identity)
        add("POST", "/jobs", self._start_job)
        add("GET", "/jobs/{id}", self._job)
        app.on_shutdown.append(self._stop)
        return app

    async def _live(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _server(self, request: web.Request) -> web.Response:
        return answer({"name": "isolatency", "version": VERSION, "extensions": []})

    async def _model(self, request: web.Request) -> web.Response:
        return answer(protocol.metadata(self._named(request)))

    async def _model_ready(self, request: web.Request) -> web.Response:
        self._named(request)
        return web.Response()

    async def _infer(self, request: web.Request) -> web.Response:
        model = self._named(request)
        wanted = protocol.parse(await request.read(), model)
        results = model.predict(wanted.x, wanted.parameters)
        version = request.match_info.get("version", model.versions[-1])
        body = protocol.response(model, version, wanted, results)
        return web.Response(body=body, content_type="application/json")

    def _named(self, request: web.Request) -> Model:
        name, version = request.match_info["model"], request.match_info.get("version")
        model = self._models.get(name)
        if model is None:
            raise _Refused(f"model {name!r} is not served; there are: {', '.join(self._models)}")
        if version is not None and version not in model.versions:
            raise _Refused(f"model {name!r} has no version {version!r}; there are: {', '.join(model.versions)}")
        return model

    async def _identity(self, request: web.Request) -> web.Response:
        if self._digest is None:
            self._digest = asyncio.create_task(asyncio.to_thread(identity.digest_of_this_tree, self._label))
        return answer(identity.facts(await asyncio.shield(self._digest)))

    async def _start_job(self, request: web.Request) -> web.Response:
        try:
            job = await self._offered().prepare(orjson.loads(await request.read()))
        except orjson.JSONDecodeError as error:
            raise BadInput(f"wanted a JSON body; it could not be parsed: {error}") from None
        except BadJob as error:
            return refusal(error.status, str(error))
        begun = answer(job.state(), 201)
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


class _Refused(web.HTTPException):
    """A refusal in words of our own."""

    def __init__(self, text: str, status: int = 404) -> None:
        self.status_code = status
        super().__init__(text=text)


async def serve(service: Service, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError when the address is taken."""
    runner = web.AppRunner(
        service.application(), access_log=None, keepalive_timeout=KEEP_ALIVE_S, shutdown_timeout=GRACE_S
    )
    await runner.setup()
    site = web.TCPSite(runner, host, port, backlog=BACKLOG)
    await site.start()
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end.set)
    bound = runner.addresses[0]
    log(f"listening on http://{bound[0]}:{bound[1]}")
    await end.wait()
    log("stopping")
    await runner.cleanup()
    log("stopped")
