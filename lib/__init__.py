"""What the three scripts are made of; the README lists the files by family.

Here: the one exception whose message is meant for the user, and the words that help in it.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator

MOST_SHOWN = 1500  # characters of a message


class UserError(Exception):
    """A mistake that the user can mend. Scripts print its message without a traceback and exit with status 2.

    Each argument is one line of it.
    """

    def __str__(self) -> str:
        return "\n  ".join(one_line(str(line)) for line in self.args)


def one_line(text: str) -> str:
    """`text` as one line of bounded length. It may quote a stranger's file: what is not printable is escaped."""
    if len(text) > MOST_SHOWN:  # the remedy stands at the end
        text = f"{text[: MOST_SHOWN - 500]} ... {text[-500:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def naming(source: object) -> Iterator[None]:
    """A context whose UserErrors begin with `source`, the file that is read."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(source)) else f"{source}: {text}") from None


def did_you_mean(word: object, options: Iterable[object]) -> str:
    """`" (did you mean 'x'?)"` for the option nearest to `word`, or the list of all options when none is near."""
    names = [str(option) for option in options]
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    if near:
        return f" (did you mean '{near[0]}'?)"
    return f" (valid: {', '.join(names)})" if names else ""
