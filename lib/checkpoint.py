"""Files that survive a crash, written atomically by a job's main process and read as data only.

Also what identifies and protects them: random states, hashes, the code's revision and file locks.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import random
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import torch

from lib import UserError, distributed
from lib.plain import check

FORMAT = "checkpoint/1"
LOCK = ".lock"  # in the folder of a run, while a process writes there
ROOT = Path(__file__).resolve().parent.parent


def save(path: Path, payload: dict) -> None:
    """Write `payload` (tensors, numbers, strings, lists, dicts) so that `path` is always a complete checkpoint."""
    if distributed.world().main:
        with replacing(path) as file:
            torch.save({"format": FORMAT, **payload}, file)


def write_text(path: Path, text: str) -> None:
    """Write a small text file in the same way."""
    if distributed.world().main:
        with replacing(path) as file:
            file.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A temporary file in the same folder, renamed to `path` on success and deleted on failure.

    Without `sync`, which takes milliseconds, a power cut may leave an empty file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            if sync:  # the bytes are on the disk before the name is
                os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        # torch's zip writer hides the cause, such as a full disk, behind an error of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({cause.strerror or cause})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def copy(path: Path, other: Path) -> None:
    """Copy a checkpoint in the same way."""
    if distributed.world().main:
        with replacing(other) as file:
            file.write(path.read_bytes())


def read(path: Path, mmap: bool = False) -> dict:
    """Read a checkpoint onto the CPU. With `mmap` the file is mapped, so that processes share its memory."""
    payload = read_any(path, mmap)
    found = payload.get("format") if isinstance(payload, dict) else type(payload).__name__
    if found != FORMAT:
        raise UserError(f"{path}: expected a checkpoint of format '{FORMAT}', found {found!r}")
    return payload


def read_any(path: Path, mmap: bool = False) -> object:
    """Read the tensors and plain data of any file that torch.save wrote onto the CPU. No code in it is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception:
        # A damaged pickle can raise anything, and torch's own message advises to switch the safe loading off.
        reason = "cut short, damaged, or with objects other than tensors and plain data"
        raise UserError(f"{path}: not a readable checkpoint: {reason}") from None


def weights(payload: dict, source: Path | str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint: the moving average if there is one, else those that were trained."""
    part = "ema" if payload.get("ema") else "model"
    tensors = check(payload.get(part), dict[str, torch.Tensor], f"{source}: {part}")
    for name, tensor in tensors.items():
        if not holds_numbers(tensor) and not name.endswith(("num_batches_tracked", "n_averaged")):
            raise UserError(f"{source}: {part}: {name}: expected plain real numbers, found {tensor.dtype}")
    if part == "model":
        return tensors
    prefix = "module."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def holds_numbers(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a file holds real numbers one by one, and is not sparse, quantised or without data."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity in it; None if there is none."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    # Read at once: the host waits for a GPU.
    sound = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist() if floats else []
    return next((name for name, is_finite in zip(floats, sound, strict=True) if not is_finite), None)


def random_states() -> dict:
    """The state of the generators of Python, NumPy, torch and every CUDA device, as plain data."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    # A run that resumes on another number of GPUs cannot continue their generators.
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def code_revision(root: Path = ROOT) -> str | None:
    """The git commit of the code in `root`, with "-dirty" if a tracked file differs from it; None without git."""
    if not (root / ".git").exists():  # a folder, or in a worktree a file
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip() or None
    return None


def lock(file: IO, wait: bool) -> None:
    """Lock `file` until it is closed or this process ends. Without `wait`, BlockingIOError if another process has it.

    Where the file system has no locks, a line says so.
    """
    try:
        # Children do not inherit this kind of lock: some of them live on for a moment when this process is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        print(f"note: {file.name}: this file system has no locks; start no second process on this folder")


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make this job the only writer of `folder` until the block or the process ends, or raise UserError."""
    if not distributed.world().main:
        yield
        return
    path, is_new = folder / LOCK, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    with file:
        try:
            lock(file, wait=False)
            if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
                raise BlockingIOError  # its last holder has removed it, and the next locks another file
        except BlockingIOError:
            file.seek(0)
            remedy = "wait for it to end, or use another folder (--train-dir)"
            raise UserError(f"{folder}: in use by {file.read() or 'another process'}; {remedy}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            # An error here, as in a folder that has become read-only, would hide the one that ended the block.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                if is_new:
                    folder.rmdir()  # if it is empty, as after a refusal


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed processes from `folder`, in which nobody else writes (`lock_folder`)."""
    for path in folder.glob(".*.[0-9]*.part") if distributed.world().main else ():
        path.unlink(missing_ok=True)
