"""The server in a Docker container of the same tree, reached at the container's own bridge address.

A published port would go through docker-proxy, which doubles a tiny request's time. gVisor is `runtime=runsc`.
"""

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

import docker
import psutil
import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound

from hostsetup.lifecycle import Lifecycle, tree_of
from hostsetup.target import PORT
from images import shell, store
from images.errors import MissingError, TargetError

if TYPE_CHECKING:
    from docker.models.containers import Container as Running

STOP_S = 5
START_TIMEOUT_S = 60
REPOSITORY = "isolatency"  # of the images that runs import: the next run finds them there
DEFAULT_HOST = "unix:///var/run/docker.sock"
TMPFS = {"/tmp": "rw,exec,mode=1777", "/run": "rw,mode=755"}


class Container(Lifecycle):
    bound_s = 30.0

    def _start(self) -> str:
        ledger, spec = self.context.ledger, self.spec
        name = f"isolatency-{ledger.id}-{spec.name}"
        settings = self._settings(name)
        if shell.dry_run():
            if "image" not in spec.options:
                shell.say(f"import {self.images.tar} as {self._tag()}, where the engine does not have it")
            shell.say(f"run a container: {settings}")
            return f"http://CONTAINER:{PORT}"
        host = os.environ.get("DOCKER_HOST", DEFAULT_HOST)
        engine = self._stack.enter_context(_engine(host))
        try:
            _refuse_without_limits(spec.name, engine.info())
            image = self._image(engine)
            self._own(ledger.add("container", name=name, docker_host=host))
            self.started = time.monotonic()
            self._container: Running = engine.containers.run(image, **settings)
            self._stack.callback(self._stop)
            self._container.reload()
        except (DockerException, requests.RequestException) as error:
            raise TargetError(f"{spec.name}: Docker would not start the container: {_words(error)}") from error
        state = self._container.attrs
        self._pid = int(state["State"]["Pid"])
        address = _address(state)
        if not address:
            self.check()
            raise TargetError(
                f"{spec.name}: the container has no address on Docker's bridge; found {state['NetworkSettings']}"
            )
        return f"http://{address}:{PORT}"

    def _settings(self, name: str) -> dict[str, Any]:
        spec = self.spec
        settings: dict[str, Any] = {
            "command": self.server_args(),
            "name": name,
            "labels": {"isolatency": self.context.ledger.id},
            "detach": True,
            "cpuset_cpus": ",".join(map(str, self.context.cores[-spec.cpus :])),
            "mem_limit": f"{spec.mem_mib}m",
            "memswap_limit": f"{spec.mem_mib}m",
            "read_only": True,
            "tmpfs": TMPFS,
            "use_config_proxy": False,  # the user's proxies are no part of the one environment
        }
        if "image" not in spec.options:
            # Docker adds HOSTNAME to the environment that the image names; the server has it in no other target.
            settings["entrypoint"] = ["/bin/busybox", "env", "-u", "HOSTNAME", *_entrypoint()]
        if "runtime" in spec.options:
            settings["runtime"] = spec.options["runtime"]
        return settings

    def _image(self, engine: docker.DockerClient) -> str:
        """The image to run: the user's, or ours, imported where this engine does not have it yet."""
        own = self.spec.options.get("image")
        wanted = str(own) if own else self._tag()
        try:
            engine.images.get(wanted)
            return wanted
        except ImageNotFound:
            if own:
                raise MissingError(
                    f"{self.spec.name} wants the image {wanted}, which this Docker engine does not have; "
                    f"bring it there: docker load, or docker pull (a sandbox's engine is a new one each time)"
                ) from None
        repository, _, tag = wanted.partition(":")
        # docker import, with the Dockerfile's own instructions
        engine.api.import_image_from_file(
            str(self.images.tar), repository=repository, tag=tag, changes=store.dockerfile_instructions()
        )
        return wanted

    def _tag(self) -> str:
        return f"{REPOSITORY}:{self.images.tree_sha256[:32]}"

    def _ended(self) -> str | None:
        try:
            self._container.reload()
        except NotFound:
            return "was removed from outside"
        except (DockerException, requests.RequestException) as error:
            return f"is out of reach, its engine does not answer ({_words(error)})"
        state = self._container.attrs["State"]
        if state["Running"]:
            return None
        return f"ended with exit code {state['ExitCode']}" + (", out of memory" if state.get("OOMKilled") else "")

    def _tail(self) -> str:
        with contextlib.suppress(DockerException, requests.RequestException, AttributeError):
            text: bytes = self._container.logs()
            with self.console.open("ab") as console:
                console.truncate(self.console_from)
                console.write(text)
        return super()._tail()

    def pids(self) -> list[int]:
        """The container's processes and the shim that holds it."""
        try:
            shim = psutil.Process(self._pid).ppid()
        except psutil.NoSuchProcess:
            return []
        return tree_of(shim) if shim > 1 else tree_of(self._pid)

    def _stop(self) -> None:
        with contextlib.suppress(DockerException, requests.RequestException):
            self._container.stop(timeout=STOP_S)
        self._tail()


def forget_images() -> list[str]:
    """Remove the images that runs have left in the user's own engine, for the next one; a sentence for each.

    Empty where no engine answers. One that a container still uses stays.
    """
    said = []
    try:
        with _engine(os.environ.get("DOCKER_HOST", DEFAULT_HOST)) as engine:
            for image in engine.images.list(name=REPOSITORY):
                for tag in image.tags:
                    if shell.dry_run():
                        shell.say(f"remove the image {tag}")
                        continue
                    with contextlib.suppress(APIError):
                        engine.images.remove(tag)
                        said.append(f"image {tag}")
    except (MissingError, DockerException, requests.RequestException):
        pass
    return said


@contextlib.contextmanager
def _engine(host: str):  # type: ignore[no-untyped-def]
    try:
        engine = docker.DockerClient(base_url=host, timeout=START_TIMEOUT_S)
        engine.ping()
    except (DockerException, requests.RequestException, OSError) as error:
        raise MissingError(
            f"no Docker engine answers at {host} ({_words(error)}); start one, or use `isolatency sandbox -- …`, "
            "which has its own where `isolatency setup` has installed dockerd"
        ) from error
    with contextlib.closing(engine):
        yield engine


def _refuse_without_limits(name: str, info: dict[str, Any]) -> None:
    """Raise MissingError where the engine would start the container all the same, on any core or with all memory."""
    if lacking := [words for key, words in (("CPUSet", "cores"), ("MemoryLimit", "memory")) if info.get(key) is False]:
        raise MissingError(
            f"{name}: this Docker engine cannot limit {' and '.join(lacking)}, for want of cgroup controllers; "
            "use `isolatency sandbox -- …`, whose engine has the machine's own"
        )


def _entrypoint() -> list[str]:
    """The server's command, as images/Dockerfile has it."""
    line = next(line for line in store.dockerfile_instructions() if line.startswith("ENTRYPOINT "))
    words: list[str] = json.loads(line.removeprefix("ENTRYPOINT "))
    return words


def _address(attributes: dict[str, Any]) -> str:
    networks = attributes["NetworkSettings"]
    found = networks.get("IPAddress") or next((n["IPAddress"] for n in networks.get("Networks", {}).values()), "")
    return str(found)


def _words(error: Exception) -> str:
    if isinstance(error, APIError) and error.explanation:
        return str(error.explanation)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
