"""The command `mimo-jax`: one verb for each thing the package does.

Exit status: 0 done, 1 a fault of the program (with traceback) or a failed comparison, 2 something the user can mend
(one line on stderr), 130 interrupted. Modules are imported by the verb that needs them, so `--help` answers at once.
"""

from __future__ import annotations

import os
import select
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from mimo_jax import verbs
from mimo_jax.parser import make_parser

CONFIG_FLAG = "--config."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status."""
    words, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options = parser.parse_args(words)
    options.overrides = overrides
    if overrides and not hasattr(options, "config"):
        parser.error(f"{overrides[0]}: only verbs with --config take overrides")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        failed = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 0
        if options.traceback or not is_expected(error):
            if _one_of_several():
                traceback.print_exc()
                _leave(1)
            raise
        print(f"error: {message_of(error)}", file=sys.stderr)
        code = 3 if verbs.worth_another_try(options, error) else 2
        if _one_of_several():
            _leave(code)
        return code
    return 1 if failed else 0


def _one_of_several() -> bool:
    """Whether this is a process of a job of several."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _leave(code: int) -> NoReturn:
    """Ends the process at once: leaving in good order waits for the others, who wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _nobody_reads() -> bool:
    """Whether the reader of our output is gone (`| head`): not a fault, and the rest of the output goes nowhere."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:
        return False  # not a stream of the operating system
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of a command line: (the rest, overrides with `=`)."""
    words, overrides = [], []
    rest = iter(arguments)
    for word in rest:
        if not word.startswith(CONFIG_FLAG):
            words.append(word)
        elif "=" in word:
            overrides.append(word)
        else:
            value = next(rest, None)
            overrides.append(word if value is None else f"{word}={value}")
    return words, overrides


def is_expected(error: BaseException) -> bool:
    """Whether an error is one that the package raises by name, or one of the file system: the message says it all."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "mimo_jax"


def message_of(error: BaseException) -> str:
    """One line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
