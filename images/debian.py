"""What comes from Debian: the packages of the tree, unpacked, and the kernel packages. One run of mmdebstrap.

`--variant=extract` unpacks and runs no maintainer script, so it works for a release other than the host's, and in
mmdebstrap's chrootless mode without root: owners and modes are settled later, whoever unpacked (images/tree.py). One
apt configuration serves all of it: kernel packages are fetched by a hook, with mmdebstrap's own.
"""

import os
import re
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from images import shell
from images.errors import IsolatencyError, MissingError, ShellError
from images.pins import Debian
from images.store import sha256

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TIMEOUT_S = 900
FORMAT = 1  # of what `fetch` makes; another one means that a cached download is not used


@dataclass(frozen=True)
class Base:
    """One download from Debian, kept in the cache: a rebuild of the tree fetches nothing."""

    root: Path

    @property
    def tar(self) -> Path:
        return self.root / "base.tar"

    @property
    def lock(self) -> Path:
        return self.root / "packages.lock"

    def deb(self, prefix: str) -> Path:
        """The one package file whose name begins with `prefix`."""
        return next(self.root.glob(f"{prefix}*.deb"))

    @property
    def kernel(self) -> Path:
        return self.deb("linux-image-")

    @property
    def uml(self) -> Path:
        return self.deb("user-mode-linux_")


def fetch(pinned: Debian, out: Path, scratch: Path) -> Base:
    """Fill the empty folder `out` with a Base. `scratch` takes what mmdebstrap needs meanwhile.

    Raises MissingError where mmdebstrap or Debian's keys are missing, ShellError with apt's last words where the
    archive cannot be reached.
    """
    if not KEYRING.exists():
        raise MissingError(f"Debian's archive keys are needed and {KEYRING} was not found; run `isolatency setup`")
    debs = scratch / "debs"
    debs.mkdir()
    fetch_kernels = (
        'cd "$1/var/cache/apt/archives" && export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" && apt-get download '
        f"{pinned.uml} $(apt-cache depends --important {pinned.kernel} | sed -n 's/.*Depends: //p')"
    )
    argv: list[str | Path] = [
        "mmdebstrap",
        "--mode=chrootless",
        "--variant=extract",
        "--architectures=amd64",
        "--format=tar",
        f"--keyring={KEYRING}",
        f"--include={','.join(pinned.include)}",
        '--aptopt=APT::Install-Recommends "false"',
        *(f"--aptopt={line}" for line in _proxies()),
        f"--extract-hook={fetch_kernels}",
        f"--extract-hook=copy-out /var/cache/apt/archives {shlex.quote(str(debs))}",
        pinned.release,
        out / "base.tar",
        *_sources(pinned),
    ]
    try:
        shell.run([*_ends_with_us(), *argv], timeout_s=TIMEOUT_S, env=_environment(scratch))
    except ShellError as error:
        wrong = [line for line in error.detail.splitlines() if line.startswith("E: ")] or [str(error)]
        raise ShellError(
            f"mmdebstrap could not bring Debian {pinned.release}: {wrong[0].removeprefix('E: ')}", error.detail
        ) from error
    files = sorted(debs.rglob("*.deb"))
    (out / "packages.lock").write_text(lock_text(pinned.release, files))
    for file in files:
        if file.name.startswith(("linux-image-", f"{pinned.uml}_")):
            shutil.move(file, out / file.name)
    return Base(out)


def lock_text(release: str, files: Iterable[Path]) -> str:
    """The lock: one line a package, `name version architecture sha256`, sorted. apt has checked what is hashed here."""
    lines = []
    for file in files:
        name, version, architecture = file.stem.split("_")
        lines.append(f"{name} {version.replace('%3a', ':')} {architecture} {sha256(file)}")
    return f"# Debian {release}: name version architecture sha256\n" + "".join(f"{line}\n" for line in sorted(lines))


def lock_differences(wanted: str, found: str) -> list[str]:
    """Sentences on how two locks differ, by package; empty where they do not."""

    def read(text: str) -> dict[str, str]:
        lines = (line.partition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: rest for name, _, rest in lines}

    old, new = read(wanted), read(found)
    sentences = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            was, now = (side[name].split()[0] if name in side else "absent" for side in (old, new))
            sentences.append(f"{name} {was} → {now}" + (" (other bytes)" if was == now else ""))
    return sentences


def differences(wanted: Path, found: Path) -> list[str]:
    """How the lock file `found` differs from `wanted`, a sentence for each package."""
    return lock_differences(wanted.read_text(), found.read_text())


def check_lock(wanted: Path, found: Path) -> None:
    """Raise IsolatencyError where the lock file `found` is not exactly `wanted`."""
    different = differences(wanted, found)
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise IsolatencyError(
            f"Debian's packages differ from {wanted}: {', '.join(different[:3])}{more}; the archive keeps only the "
            "newest versions, the way back to older ones is `isolatency images load`",
            "\n".join(different),
        )


def host_sources(targets: str, pinned: Debian) -> list[str]:
    """apt source lines for the pinned release, from the host's own; `targets` is what `apt-get indextargets` prints.

    Only Debian's are taken: apt knows the origin of a source once it has been updated; before that the address must
    name debian. A source that still is none fails on its signature, since only Debian's keys are handed on.
    """
    suites = [f"{pinned.release}{suffix}" for suffix in ("", "-updates", "-security")]
    lines = []
    for target in targets.splitlines():
        address, suite, codename, component, origin = target.split("|")
        unknown = origin.startswith("$(")
        ours = "debian" in address if unknown else origin == "Debian"
        name = suite if suite in suites else codename
        if ours and name in suites and component == "main":
            lines.append(f"deb [signed-by={KEYRING}] {address} {name} main")
    return list(dict.fromkeys(lines))


def _sources(pinned: Debian) -> list[str]:
    """The host's own Debian sources where it is of the pinned release; none means mmdebstrap's default mirror."""
    try:
        system = Path("/etc/os-release").read_text()
    except OSError:
        return []
    if not re.search(rf'^VERSION_CODENAME="?{pinned.release}"?$', system, re.MULTILINE):
        return []
    form = "$(REPO_URI)|$(RELEASE)|$(CODENAME)|$(COMPONENT)|$(ORIGIN)"
    found = shell.run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"], changes=False, check=False)
    return host_sources(found.stdout, pinned)


def _proxies() -> list[str]:
    """The host's proxies for apt: mmdebstrap reads none of its configuration."""
    found = shell.run(["apt-config", "dump"], changes=False, check=False).stdout
    return [line for line in found.splitlines() if re.match(r"Acquire::https?::Proxy\b", line)]


def _ends_with_us() -> list[str]:
    """A killed build must leave nothing running: as root in a PID namespace, else at least mmdebstrap itself ends."""
    own = ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    return ["setpriv", "--pdeathsig", "KILL", *([] if os.geteuid() else own)]


def _environment(scratch: Path) -> dict[str, str]:
    """Little of the host's. What mmdebstrap unpacks lies in our own temporary folder, which is swept after a kill."""
    passed = {name: os.environ[name] for name in ("HOME", "http_proxy", "https_proxy") if name in os.environ}
    path = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
    return passed | {"PATH": path, "LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": "0", "TMPDIR": str(scratch)}
