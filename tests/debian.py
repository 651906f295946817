"""CPythons that are newer than the system's: those of Debian's suite `sid`, in a folder of the checkout.

debootstrap installs a minimal Debian into the folder, once. A command that runs inside has the folder's /usr
mounted over the system's, in a mount namespace of its own. Its programs and libraries are the folder's,
whereas /etc, /tmp, home directories and the checkout are the system's, so pip and the tests find the same
files as outside. The mount ends with the command, however the command ends. Nothing is mounted below the
folder, so it can be removed at any time.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

__all__ = ["NEWEST", "Unavailable", "inside"]

NEWEST = ("3.14", "3.15")
"""The versions in the folder."""

_MIRROR = "http://deb.debian.org/debian"
_PARTS = pathlib.Path(__file__).resolve().parent.parent / ".parts"
_MOUNTED = 'mount --bind "$0" /usr && exec "$@"'


class Unavailable(Exception):
    """The newest CPythons can't be installed on this machine."""


def inside() -> tuple[str, ...]:
    """Return the beginning of a command that runs in the folder; create the folder the first time.

    Raises:
        Unavailable: If the folder can't be created here.
    """
    _check()
    folder = _PARTS / "-".join(["debian", *NEWEST])
    if not folder.exists():
        _make(folder)
    return ("unshare", "--mount", "sh", "-c", _MOUNTED, str(folder / "usr"))


def _check() -> None:
    if not hasattr(os, "geteuid") or os.geteuid():
        raise Unavailable("only root can install Debian into a folder and mount it")
    if not all(os.path.islink(f"/{name}") for name in ("bin", "lib")):
        raise Unavailable("/bin and /lib of this system are not in /usr")
    if _run("unshare", "--mount", "true").returncode:
        raise Unavailable("this system permits no mount namespace")


def _make(folder: pathlib.Path) -> None:
    """Install Debian into ``folder``, which exists only once it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    packages = ",".join(f"python{version}-venv" for version in NEWEST)
    options = ["--variant=minbase", f"--include={packages}", "sid", str(partial), _MIRROR]
    # In a mount namespace of its own: debootstrap mounts /proc, and leaves it mounted when it is interrupted.
    done = _run("unshare", "--mount", *_debootstrap(), *options)
    if done.returncode:
        raise Unavailable(f"debootstrap failed:\n{done.stdout[-2000:]}")
    partial.rename(folder)


def _debootstrap() -> list[str]:
    """Return the command of debootstrap; unpack its package if it is not installed."""
    found = shutil.which("debootstrap", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if found:
        return [found]
    if not shutil.which("apt-get"):
        raise Unavailable("neither debootstrap nor apt-get is installed")
    unpacked = _PARTS / "debootstrap"
    unpacked.mkdir(parents=True, exist_ok=True)
    script = "apt-get update -qq && apt-get download -qq debootstrap && dpkg -x debootstrap_*.deb ."
    done = _run("sh", "-c", script, cwd=unpacked)
    if done.returncode:
        raise Unavailable(f"apt-get can't download debootstrap:\n{done.stdout[-2000:]}")
    usr = unpacked / "usr"
    return ["env", f"DEBOOTSTRAP_DIR={usr}/share/debootstrap", f"{usr}/sbin/debootstrap"]


def _run(*command: str, cwd: pathlib.Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
