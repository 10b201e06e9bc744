"""What a command says: nothing of the backend's, a warning once, an error in one line."""

import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from stable_diffusion_tf.checkpoints.readers import CheckpointError
from stable_diffusion_tf.screen import printable


class ChangedError(ValueError):
    """What a picture was drawn with is gone, or another by now."""


def ensure_stderr() -> None:
    """Opens stderr where it is closed: else the next file opened gets what is said there."""
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        os.dup2(sys.stderr.fileno(), 2)


@contextmanager
def quiet_import() -> Iterator[None]:
    """Keeps what TensorFlow says while it is imported off the screen, unless the import fails.

    Its first lines do not obey TF_CPP_MIN_LOG_LEVEL and are written by C++, past `sys.stderr`.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    ensure_stderr()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except Exception:
            said.seek(0)
            os.write(screen, said.read())
            raise
        finally:
            os.dup2(screen, 2)
            os.close(screen)


@contextmanager
def warnings_once() -> Iterator[None]:
    """Within, what is logged for every prompt is shown for the first."""
    shown = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return message not in shown and not shown.add(message)

    logging.lastResort.addFilter(is_new)
    try:
        yield
    finally:
        logging.lastResort.removeFilter(is_new)


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def _terminate(*_: object) -> None:
    raise Terminated


@contextmanager
def interrupted_when_told_to_end() -> Iterator[None]:
    """Within, SIGTERM is Ctrl-C, unless it has a meaning: so that nothing is left half-written."""
    main = threading.current_thread() is threading.main_thread()  # only there it can be set
    ours = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if ours and signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def errors_in_one_line(drawing: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Reports what is wrong with the input, Ctrl-C, and SIGTERM like it, without a traceback.

    Once `drawing()`, the arguments have been found right. Then only the model's files, the disk or
    an overflow can be at fault; any other error is one of the program, and shown in full.
    """
    try:
        with interrupted_when_told_to_end():
            yield
    except BrokenPipeError:  # who reads what is printed has had enough; click ends it quietly
        raise
    except (
        ValueError,
        OSError,
        ImportError,
        NotImplementedError,
        FloatingPointError,
        MemoryError,
    ) as error:
        mendable = CheckpointError | ChangedError | OSError | FloatingPointError | MemoryError
        if drawing() and not isinstance(error, mendable):
            raise
        message = " ".join(str(error).split()) or "there is not enough memory."
        message = re.sub(r"^\[Errno \d+\] ", "", message)
        if backend_is_missing(error):
            message += ", Keras's backend; install it, or set KERAS_BACKEND to tensorflow or jax"
        if not isinstance(error, CheckpointError | OSError):  # of files, by their names
            message = with_options(message)
        click.echo(f"Error: {printable(message)}", err=True)
        sys.exit(2)
    except KeyboardInterrupt as error:
        click.echo("Interrupted.", err=True)
        # As shells tell whom a signal ended: 128 and its number.
        sys.exit(128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT))


def backend_is_missing(error: BaseException) -> bool:
    """Whether Keras has not found what KERAS_BACKEND names, or there is no such backend."""
    if isinstance(error, ImportError):
        return error.name == os.environ.get("KERAS_BACKEND")
    return str(error).startswith("Unable to import backend")


def with_options(message: str) -> str:
    """What an error says, with the command's options in the place of the API's parameters."""
    context = click.get_current_context(silent=True)
    if context is None:  # while a script is imported
        return message
    command = context.command
    # Those with an underscore, which are no English words; and not in quotes or a file's name.
    quoted = r"""(?<!\w)(?:'[^']*'|"[^"]*")"""
    options = {one.name: one.opts[0] for one in command.params if "_" in one.name}
    names = {"img_height": "--size", "img_width": "--size", "batch_size": "--batch"}
    known = {name for one in command.params for name in one.opts}
    options |= {name: option for name, option in names.items() if option in known}
    name = r"""(?<![-\w'"./\\])\w+_\w+(?![-\w'"/\\]|\.\w)"""
    return re.sub(f"{quoted}|{name}", lambda match: options.get(match[0], match[0]), message)
