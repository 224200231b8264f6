"""The Debian packages that isolatency needs: which are missing, the command that installs them, and running it.

Nothing is ever removed or upgraded, and where a Docker engine is there already no other one is installed.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from images import shell, vmm
from images.errors import IsolatencyError

PACKAGES = {
    "e2fsprogs": "ext4 images",
    "iproute2": "taps and namespaces",
    "iptables": "the container bridge, internet=true",
    "mmdebstrap": "the one tree",
    "qemu-system-x86": "qemu, and the emulated host of a nested Firecracker",
    "util-linux": "namespaces",
}
ENGINE = ("docker.io", "docker")
KEYS = ("debian-archive-keyring", "Debian's keys, to build the tree elsewhere than on Debian")
APT_TIMEOUT_S = 1800


def missing() -> dict[str, str]:
    """Package → what it is for, of those that are not installed. Raises MissingError where there is no dpkg."""
    wanted = dict(PACKAGES)
    if shutil.which("dockerd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
        wanted |= dict([ENGINE])
    if "ID=debian" not in Path("/etc/os-release").read_text().splitlines():
        wanted |= dict([KEYS])
    done = shell.run(
        ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *wanted],
        changes=False,
        check=False,
    )
    present = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" installed")}
    return {package: why for package, why in wanted.items() if package not in present}


def command(packages: dict[str, str]) -> list[str]:
    return ["apt-get", "install", "-y", "--no-install-recommends", "--no-remove", "--no-upgrade", *packages]


def setup(*, yes: bool, ask: Callable[[str], bool | None], say: Callable[[str], None]) -> None:
    """Install what is missing, when allowed; `ask` returns None where there is no terminal to ask at.

    Raises ShellError with apt's own words.
    """
    packages = missing()
    for package, why in packages.items():
        say(f"missing: {package} ({why})")
    if packages and _allowed(packages, yes, ask, say):
        root = [] if os.geteuid() == 0 else ["sudo"]
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        shell.run([*root, "apt-get", "update"], timeout_s=APT_TIMEOUT_S, env=environment)
        shell.run([*root, *command(packages)], timeout_s=APT_TIMEOUT_S, env=environment)
        say("installed" if not shell.dry_run() else "nothing was installed: this is a dry run")
    elif not packages:
        say("all Debian packages are there")
    _firecracker(say)


def _allowed(
    packages: dict[str, str], yes: bool, ask: Callable[[str], bool | None], say: Callable[[str], None]
) -> bool:
    line = " ".join(command(packages))
    if yes or shell.dry_run():
        return True
    answer = ask(f"Install {len(packages)} packages?")
    if answer is None:
        say(f"no terminal to ask at, so nothing is installed; the command is: {line}")
    elif not answer:
        say(f"not installed; the command is: {line}")
    return bool(answer)


def _firecracker(say: Callable[[str], None]) -> None:
    try:
        path, version, _ = vmm.find_firecracker(None)
        say(f"Firecracker {version} is there: {path}")
        return
    except IsolatencyError:
        pass
    if shell.dry_run():
        shell.say("fetch the Firecracker release into the cache")
        return
    try:
        say(f"Firecracker is in the cache: {vmm.fetch_firecracker(say)}")
    except IsolatencyError as error:
        say(f"no Firecracker: {error}")
