"""Where this machine's programs lie. Those of the administrator are often not in an ordinary user's PATH."""

import os
import shutil

ADMIN = "/usr/local/sbin:/usr/sbin:/sbin"


def search_path() -> str:
    return f"{os.environ.get('PATH', '/usr/local/bin:/usr/bin:/bin')}:{ADMIN}"


def find(program: str) -> str | None:
    """The program's path, None where it is not there."""
    return shutil.which(program, path=search_path())
