# SPDX-License-Identifier: Apache-2.0
"""Small file systems of a test's own: ext4 in a loop file that can be shut down, tmpfs that can be full. For root."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

from reliability.suite import SkippedError

_EXT4_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SkippedError(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()}")


def _need_root(*tools: str) -> None:
    if os.geteuid() != 0:
        raise SkippedError("mounting needs root")
    # Not everybody's PATH has them.
    os.environ["PATH"] = os.environ["PATH"] + ":/usr/sbin:/sbin"
    for tool in tools:
        if shutil.which(tool) is None:
            raise SkippedError(f"there is no {tool}")


class Mount:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def unmount(self) -> None:
        for _ in range(100):
            if subprocess.run(["umount", self.directory], capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.02)  # a process that was killed still has something there
        _run("umount", self.directory)


class Ext4(Mount):
    """ext4 with a journal, in a file."""

    def __init__(self, image: Path, directory: Path, megabytes: int = 256) -> None:
        _need_root("mkfs.ext4", "mount", "umount")
        super().__init__(directory)
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        self.image = image
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1", image)

    def mount(self, commit_seconds: int = 5) -> None:
        _run("mount", "-o", f"loop,commit={commit_seconds}", self.image, self.directory)

    def lose_power(self) -> None:
        """From now on nothing reaches the disk, not even the journal's own buffers."""
        fd = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        except OSError as refused:
            raise SkippedError(f"this kernel does not shut ext4 down: {refused}") from refused
        finally:
            os.close(fd)

    def sync(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY)
        ctypes.CDLL(None).syncfs(fd)
        os.close(fd)


class Tmpfs(Mount):
    """Memory of a fixed size; `leave` fills it up to some free pages."""

    def __init__(self, directory: Path, megabytes: int) -> None:
        _need_root("mount", "umount")
        super().__init__(directory)
        _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", directory)

    def leave(self, pages: int) -> None:
        """A file takes all but so many pages of 4 KiB."""
        fd = os.open(self.directory / "filler", os.O_WRONLY | os.O_CREAT)
        try:
            while (free := os.statvfs(self.directory).f_bavail) > pages:
                try:
                    os.posix_fallocate(fd, os.fstat(fd).st_size, (free - pages) * 4096)
                except OSError as error:  # somebody else writes there
                    if error.errno != errno.ENOSPC:
                        raise
        finally:
            os.close(fd)

    def make_space(self) -> None:
        (self.directory / "filler").unlink()
