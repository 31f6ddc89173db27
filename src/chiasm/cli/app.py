"""The commands together, and how they end."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, TextIO

from chiasm import __version__
from chiasm.errors import ChiasmError
from chiasm.extras import explained

_EXIT_CODE = 2
_NOT_WRITTEN = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What only writing can fail with."""
_INTERRUPTED = 130
_NOBODY_READS = 128 + signal.SIGPIPE
"""Exit code when nobody reads standard output anymore, as of a command that SIGPIPE ends."""
COMMANDS = {
    "serve": "Run all instances of a model and the proxy on this machine.",
    "instance": "Run one instance of a model.",
    "proxy": "Run the proxy in front of instances.",
    "drain": "Take an instance down without losing anything.",
    "demo": "Ask a small model about images, and show what each process did.",
    "models": "List the checkpoints that come with chiasm.",
    "bench": "Benchmark E+PD and E+P+D against one aggregated instance.",
    "plan": "Say which layout suits given devices, requests and limits of time.",
    "doctor": "Check a running or planned deployment, and say what is wrong.",
    "completion": "Print the completion script of a shell.",
}
"""Each is a module of this package with ``parser()`` and ``run(settings)``, which returns an exit code or None."""
_OF_DEPLOYMENTS = ("child", "fork-server")
"""For launch.Deployment, not for people."""
_HELP = f"""\
usage: chiasm COMMAND [OPTIONS]

  Serve multimodal models with the vision encoder in processes of its own.

Commands:
{chr(10).join(f"  {name:<10} {text}" for name, text in COMMANDS.items())}

Options:
  --version  Print the version and exit.
  --help     Show this message and exit.

`chiasm COMMAND --help` shows the options of a command.
"""


def main() -> None:
    """Run the command that the arguments name. Expected faults end with one line on stderr and exit code 2."""
    _open_closed_streams()
    _handle_signals_as_first_process()
    try:
        try:
            code = _run(sys.argv[1:])
        finally:
            sys.stdout.flush()
        sys.exit(code)
    except ChiasmError as error:
        _fail(error.message)
    except ModuleNotFoundError as error:
        missing = explained(error, " ".join(["`chiasm", *sys.argv[1:2]]) + "`")
        if missing is None:
            raise
        _fail(missing.message)
    except BrokenPipeError:
        if not _is_without_reader(sys.stdout):
            raise
        _discard_output()
        sys.exit(_NOBODY_READS)
    except PermissionError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename} can't be used: {error.strerror}. Let this user have it, or name another path.")
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        _discard_output()
        what = error.filename or "what this command prints or stores"
        _fail(f"There is no room for {what}: {os.strerror(error.errno)}. Free some, and try again.", _NOT_WRITTEN)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich has seen it, and discards the output by itself
            sys.exit(_NOBODY_READS)
        raise
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except MemoryError:
        _fail("There is not enough memory; use a smaller model, or lower --kv-cache-bytes and --encoder-cache-bytes.")


def _run(arguments: Sequence[str]) -> int | None:
    name, *others = arguments or [""]
    if name in ("", "--help", "-h"):
        print(_HELP, end="", file=sys.stdout if name else sys.stderr)
        return None if name else _EXIT_CODE
    if name == "--version":
        print(f"chiasm {__version__}")
        return None
    if name in _OF_DEPLOYMENTS:
        from chiasm.launch.run import run_child

        child: str | None
        if name == "child":
            (child,) = others
        else:
            from chiasm.launch.fork_server import serve

            child = serve()
        if child is not None:
            run_child(child)
        return None
    if name not in COMMANDS:
        _fail(f"There is no command {name!r}; the commands are {', '.join(COMMANDS)}.")
    command = import_module(f"chiasm.cli.{name}")
    code: int | None = command.run(command.parser().parse(others))
    return code


def _open_closed_streams() -> None:
    """Have what is written to standard output or error go nowhere if it was closed: Python has no stream then."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, it stays open


def _handle_signals_as_first_process() -> None:
    """Let signals end the first process of a container before its command handles them.

    Linux ends this process by none that it doesn't handle.
    """
    if os.getpid() == 1:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, lambda received, frame: sys.exit(128 + received))


def _is_without_reader(stream: TextIO) -> bool:
    """Return whether whoever read what is written there, such as ``head``, has gone."""
    poll = select.poll()
    poll.register(stream, 0)  # that is told in any case
    return bool(poll.poll(0))


def _discard_output() -> None:
    """Have what is left to write to standard output go nowhere: at the end, Python would fail to write it once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int = _EXIT_CODE) -> NoReturn:
    with contextlib.suppress(OSError):  # the code says it too
        print(f"Error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
