"""The Debian packages that isolatency needs: which are missing, the command that installs them, and running it.

Nothing is ever removed or upgraded, and where a Docker engine is there already no other one is installed.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from hostsetup import machine
from images import shell, vmm
from images.errors import IsolatencyError, MissingError, ShellError

Ask = Callable[[str], bool | None]
Say = Callable[[str], None]

PACKAGES = {
    "debian-archive-keyring": "Debian's keys, for the one tree",
    "e2fsprogs": "ext4 images",
    "iproute2": "taps and namespaces",
    "iptables": "the container bridge, internet=true",
    "mmdebstrap": "the one tree",
    "qemu-system-x86": "qemu, and the emulated host of a nested Firecracker",
    "util-linux": "namespaces",
}
ENGINE = {"docker.io": "docker"}
APPARMOR = {"apparmor": "docker, where the kernel has AppArmor on: its engine loads a profile for each container"}
APT_TIMEOUT_S = 1800
LISTS = Path("/var/lib/apt/lists")
# The Docker engine's package starts it, with a bridge and firewall rules on this machine that nothing of ours needs.
# systemctl and runlevel(8) honour these two, so that no service is started; policy-rc.d would be a file of the user's.
_QUIET = ("DEBIAN_FRONTEND=noninteractive", "SYSTEMD_OFFLINE=1", "RUNLEVEL=1")
ENGINE_NOTE = (
    "docker.io's own service is not started now, but would be when the machine starts again; "
    "a sandbox does not need it: systemctl disable docker.service docker.socket"
)


def missing() -> dict[str, str]:
    """Package → what it is for, of those that are not installed. Raises MissingError where there is no dpkg."""
    wanted = PACKAGES | ({} if machine.find("dockerd") else ENGINE)
    wanted |= APPARMOR if machine.lacks_apparmor_parser() else {}
    if machine.find("dpkg-query") is None:
        raise MissingError(f"setup knows Debian and Ubuntu only; install what provides: {', '.join(wanted)}")
    form = "${Package} ${db:Status-Status}\n"
    done = shell.run(["dpkg-query", "--show", "--showformat", form, *wanted], changes=False, check=False)
    present = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" installed")}
    return {package: why for package, why in wanted.items() if package not in present}


def command(packages: Mapping[str, str]) -> list[str]:
    return ["apt-get", "install", "-y", "--no-install-recommends", "--no-remove", "--no-upgrade", *packages]


def setup(*, yes: bool, ask: Ask, say: Say) -> None:
    """Install what is missing, when allowed; `ask` returns None where there is no terminal to ask at.

    Raises ShellError with apt's own words, IsolatencyError where apt would have to upgrade or remove something.
    """
    packages = missing()
    for package, why in packages.items():
        say(f"missing: {package} ({why})")
    if packages:
        asked = f"Install {len(packages)} packages?"
        if _allowed(asked, f"the command is: {' '.join(command(packages))}", yes, ask, say):
            install(packages, say)
    else:
        say("all Debian packages are there")
    _firecracker(yes, ask, say)


def install(packages: Mapping[str, str], say: Say) -> None:
    """Install these packages. Raises as `setup` does."""
    root = _as_root(packages)
    if not any(LISTS.glob("*_Packages*")) or not _simulated(packages):
        shell.run([*root, "apt-get", "update"], timeout_s=APT_TIMEOUT_S)
    _refuse_changes(packages)
    shell.run([*root, "env", *_QUIET, *command(packages)], timeout_s=APT_TIMEOUT_S)
    say("installed" if not shell.dry_run() else "nothing was installed: this is a dry run")
    if packages.keys() & ENGINE.keys():
        say(ENGINE_NOTE)


def _as_root(packages: Mapping[str, str]) -> list[str]:
    if os.geteuid() == 0:
        return []
    if machine.find("sudo") is None and not shell.dry_run():
        raise MissingError(
            f"installing packages needs root, and there is no sudo; as root: {' '.join(command(packages))}"
        )
    return ["sudo"]


def _simulated(packages: Mapping[str, str]) -> str:
    """What apt says that it would do; empty where it cannot do it (with the lists that it has)."""
    done = shell.run(["apt-get", "--simulate", *command(packages)[1:]], changes=False, check=False, timeout_s=120)
    return "" if done.returncode else done.stdout


def changes(simulated: str) -> list[str]:
    """The packages that a simulated installation would upgrade (`Inst name [old version] (…`) or remove (`Remv`)."""
    return re.findall(r"^(?:Inst (?=\S+ \[)|Remv )(\S+)", simulated, re.MULTILINE)


def _refuse_changes(packages: Mapping[str, str]) -> None:
    if changed := changes(_simulated(packages)):
        raise IsolatencyError(
            f"apt would have to upgrade or remove {', '.join(changed)}, which setup never does; "
            f"bring the machine up to date (apt-get upgrade), or: apt-get install {' '.join(packages)}"
        )


def _allowed(question: str, otherwise: str, yes: bool, ask: Ask, say: Say) -> bool:
    if yes or shell.dry_run():
        return True
    answer = ask(question)
    if answer is None:
        say(f"no terminal to ask at, so this is left out; {otherwise}")
    elif not answer:
        say(f"left out; {otherwise}")
    return bool(answer)


def _firecracker(yes: bool, ask: Ask, say: Say) -> None:
    """The release, as a file in the cache. Without it only that kind is left out, so a failure is but said."""
    try:
        path, version, _ = vmm.find_firecracker(None)
        say(f"Firecracker {version} is there: {path}")
        return
    except IsolatencyError as error:
        say(f"missing: Firecracker ({error})")
    if not _allowed("Fetch Firecracker's release into the cache?", "isolatency setup --yes fetches it", yes, ask, say):
        return
    if shell.dry_run():
        shell.say("fetch the Firecracker release into the cache")
        return
    try:
        say(f"Firecracker is in the cache: {vmm.fetch_firecracker(say)}")
    except (IsolatencyError, ShellError) as error:
        say(f"no Firecracker: {error}")
