"""Large files from the hub: a download that was stopped, even by a kill, goes on where it was.

The hub's own library knows where a file is, and its size and hash; but its newer versions begin a download that was
killed anew, which for a file of 12 GB is an hour.
"""

from __future__ import annotations

import errno
import http.client
import shutil
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from llamagen_unitok.published.presets import HubFile
from modelfolder import file_hash

# What the disk says, not the network.
LOCAL_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
ATTEMPTS = 5  # in a row without a byte between them
WAIT_SEC = 2.0  # between attempts
TIMEOUT_SEC = 60
BLOCK_BYTES = 1 << 20
SHA256_DIGITS = 64


class DamagedDownload(ValueError):
    """A complete file whose content is not the hub's."""


def download_from_hub(file: HubFile, path: Path) -> None:
    """Download a file of a public hub repository to `path`, which appears when it is complete.

    Raises OSError when the disk is too small, before it is full; DamagedDownload where the SHA-256 is not the hub's;
    and whatever the hub's library raises where it cannot be asked.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(file.repository, file.name)
    told = get_hf_file_metadata(url)  # says at once that there is no network
    download(url, path, told.size)
    # Of a large file the hub's tag is its SHA-256; of a small one it is a git hash.
    if told.etag and len(told.etag) == SHA256_DIGITS and (found := file_hash(_part(path))) != told.etag:
        _part(path).unlink()
        raise DamagedDownload(f"{path.name} arrived damaged (SHA-256 {found}, the hub says {told.etag}): try again")
    _part(path).replace(path)


def download(url: str, path: Path, size: int | None = None) -> Path:
    """Fetch `url` into PATH.part, from where an earlier call got to; returns that file, complete.

    size: in bytes, if it is known.   A connection that breaks is taken up again a few times.
    """
    part = _part(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    there = part.stat().st_size if part.is_file() else 0
    if size is not None and size - there > shutil.disk_usage(part.parent).free:
        raise OSError(errno.ENOSPC, f"{(size - there) / 1e9:.1f} GB are needed for {path.name}, which are not free")
    fruitless = 0
    with tqdm(total=size, initial=there, desc=path.name, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        while size is None or there < size:
            try:
                ended = _receive(url, part, there, bar)
            except HTTPError as error:
                if error.code < 500:  # it will not be there the next time either
                    raise
                ended = False
            except (URLError, ConnectionError, TimeoutError, http.client.HTTPException):
                ended = False
            got = part.stat().st_size if part.is_file() else 0
            if ended and size is None:
                break
            fruitless = 0 if got > there else fruitless + 1
            there = got
            if fruitless == ATTEMPTS:
                raise ConnectionError(f"{url} broke off {ATTEMPTS} times at {there} bytes")
            if not ended:
                time.sleep(WAIT_SEC)
    return part


def _receive(url: str, part: Path, start: int, bar: tqdm) -> bool:
    """Append what `url` has from byte `start` on to a file; True when the server ended it."""
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urlopen(request, timeout=TIMEOUT_SEC) as response:
        goes_on = response.status == http.client.PARTIAL_CONTENT
        if start and not goes_on:  # a server without ranges begins anew
            bar.update(-start)
        with open(part, "ab" if goes_on else "wb") as out:
            while block := response.read(BLOCK_BYTES):
                out.write(block)
                bar.update(len(block))
    return True


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")
