"""Files that are written whole or not at all, and read with suspicion."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, mode 0600, so that its name appears only with all of its content on disk."""
    temporary = path.with_name(f".{path.name}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file in one move: a reader sees the old or the new content, never half, on a full disk too."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # process numbers meet in shared folders
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The digest of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_plain(path: Path, max_bytes: int | None = None) -> None:
    """Refuse a link, which may lead anywhere, and a device or pipe, which may never end.

    Raises ValueError for those and for more than max_bytes, OSError where there is nothing.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a plain file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ValueError(f"{path} is too large: {status.st_size} bytes, {max_bytes} at most")
