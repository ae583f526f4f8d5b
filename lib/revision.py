"""Which version of this code is running."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def code_revision(root: Path = ROOT) -> str | None:
    """The git commit of the code in `root`, with "-dirty" if a tracked file differs from it.

    None where `root` is no git checkout (a folder within somebody else's is none), or there is no git.
    """
    if not (root / ".git").exists():  # a folder, or a file in a worktree
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
