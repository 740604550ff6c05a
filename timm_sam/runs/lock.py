"""One process at a time in a run's folder."""
import logging
import os
import socket

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)

FILE = ".lock"


class Locked(Exception):
    """Another process is in the folder; the message names it."""


class Lock:
    """Held from here to :meth:`release`, or to the end of the process, however it ends.

    The lock is the system's (POSIX), on a file that says who has it; the file alone, which a killed process leaves,
    locks nothing. Processes that are forked do not inherit it.

    Args:
        folder: Of the run; it is there.

    Raises:
        Locked: Another process has it.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, FILE)
        self._fd: int | None = None
        taken = fcntl is None
        while not taken:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                taken = self._take(fd)
            finally:
                if self._fd is None:
                    os.close(fd)

    def _take(self, fd: int) -> bool:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise Locked(" ".join(os.pread(fd, 200, 0).decode(errors="replace").split()) or "another process") from None
        except OSError as e:
            _logger.warning(f"{self._path}: the file system has no locks ({e.strerror}): see to it that no second run "
                            f"is started in this folder.")
            return True
        if not self._is_there(fd):  # its owner was about to leave, and has removed it
            return False
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._fd = fd
        return True

    def _is_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(fd))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Lets others in."""
        if self._fd is None:
            return
        if self._is_there(self._fd):
            os.unlink(self._path)
        os.close(self._fd)
        self._fd = None
