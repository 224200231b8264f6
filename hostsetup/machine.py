"""Where this machine's programs lie. Those of the administrator are often not in an ordinary user's PATH."""

import os
import shutil
from pathlib import Path

ADMIN = "/usr/local/sbin:/usr/sbin:/sbin"
APPARMOR = Path("/sys/module/apparmor/parameters/enabled")


def search_path() -> str:
    return f"{os.environ.get('PATH', '/usr/local/bin:/usr/bin:/bin')}:{ADMIN}"


def find(program: str) -> str | None:
    """The program's path, None where it is not there."""
    return shutil.which(program, path=search_path())


def lacks_apparmor_parser() -> bool:
    """Whether AppArmor is on and its parser is not there: Docker's engine then refuses to start a container."""
    try:
        on = APPARMOR.read_text().strip() == "Y"
    except OSError:
        return False
    return on and find("apparmor_parser") is None
