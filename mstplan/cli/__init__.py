"""The command line: options in, one library call, a table or JSON out, an exit code.

A command's options are one object of a class that declares them (`options.py`), which the command turns into model, card and recipe
before anything else. Declaring them takes 1.2 ms of a start, all of mstplan.cli's own imports (`python -X importtime -m mstplan max-seq ...`).

Exit codes: 0 an answer (for `plan`: it fits), 1 it does not fit, 2 the input cannot be used, 70 a defect of mstplan's,
130 interrupted, 141 the reader of the output went away.
"""

from __future__ import annotations

import gc
import os
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer

from .commands import COMMANDS, FLAGS, app
from .output import Unwritten, complain, open_streams, sane_terminal

SHOW, INSTALL = "--show-completion", "--install-completion"


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        typer.echo(f"mstplan {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, metavar="", help="Show the version.")
    ] = False,
    show_completion: Annotated[
        str, typer.Option(SHOW, metavar="[SHELL]", help="Print what makes bash, zsh or fish complete mstplan's words.")
    ] = "",
    install_completion: Annotated[
        str, typer.Option(INSTALL, metavar="[SHELL]", help="Put it where the shell looks. Default: the one in $SHELL.")
    ] = "",
) -> None:
    """`_complete` has done what the last two ask for."""


def declarations(command: str | None) -> dict[str, Callable[[], object]]:
    """How to declare each command to typer, by name; only some of them when `command` is among those."""
    for module in ("planning", "tracing", "measuring", "validating", "checking", "listing"):
        if command not in COMMANDS:
            import_module(f".{module}", __name__)  # registers its commands
    return COMMANDS


def _completes() -> bool:
    """Whether a shell asks for completions, or someone for the shell's script."""
    return "_MSTPLAN_COMPLETE" in os.environ or (len(sys.argv) > 1 and sys.argv[1].split("=")[0] in (SHOW, INSTALL))


def _complete() -> NoReturn:
    from ..errors import InputError
    from . import completing

    try:
        request = os.environ.get(completing.VARIABLE)
        typer.echo(completing.answer(request) if request is not None else completing.run(sys.argv[1:]), nl=False)
    except InputError as e:
        complain(str(e))
        raise SystemExit(2) from None
    raise SystemExit(0)


def main() -> None:
    """Run the command of sys.argv; ends in SystemExit, as typer's programs do."""
    sane_terminal()
    if _completes():
        _complete()
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    commands = declarations(command)
    for name, declare in commands.items():
        if name == command or command not in commands:
            declare()
    try:
        code = app(prog_name="mstplan", standalone_mode=False)  # or else typer draws a box around each mistake
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except Exception as e:
        if not hasattr(e, "format_message"):
            raise
        code = _misused(e)
    raise SystemExit(code if isinstance(code, int) else 0)


_NO_WHOLE_NUMBER = ("Input should be a valid integer, unable to parse string as an integer", "must be a whole number")
"""What typer says of an option's value, and what mstplan says."""


def _misused(error: Any) -> int:
    """Says what is wrong with the command line, in two lines. `error` is click's UsageError, wherever typer has it from."""
    from ..errors import one_line

    message = " ".join(error.format_message().split()).replace(*_NO_WHOLE_NUMBER)
    if type(error).__name__ != "NoArgsIsHelpError":
        named = next((argument for argument in sys.argv[1:] if argument in COMMANDS), "")
        refusal = (
            _unknown_option(error.option_name, getattr(error.ctx, "info_name", ""))
            if type(error).__name__ == "NoSuchOption"
            else None
        )
        complain(refusal or f"{one_line(message, 200)}\nTry 'mstplan {named} --help'.".replace("  ", " "))
    elif message:  # else typer has printed the help already
        typer.echo(error.format_message(), err=True)
    return 2


_MOVED = {"--published": "published", "--smax": "check-smax", "--throughput": "check-throughput"}
"""What was an option of validate, and is a command of its own."""


def _moved() -> str | None:
    """Two lines about an option that has become a command, the second of them that command."""
    typed = sys.argv[1:]
    if "validate" not in typed or (flag := next((word for word in typed if word in _MOVED), None)) is None:
        return None
    words = [word for word in typed if word not in _MOVED]
    words[words.index("validate")] = _MOVED[flag]
    return f"validate {flag} is a command of its own now:\n{shlex.join(['mstplan', *words])}"


def _unknown_option(typed: str, command: str) -> str | None:
    """Two lines about an option that `command` does not have: whose it is, or what is planned of it. None: nothing is known."""
    from ..step import names

    if command == "validate" and (moved := _moved()) is not None:
        return moved

    declarations(None)  # of every command
    row, whose = names.find_option(typed), _commands_with({typed})
    if row is not None:
        flags = set(names.flags_of(row))
        return names.unknown_option(
            typed, row, "" if flags <= FLAGS.get(command, set()) else f" (mstplan {_commands_with(flags)})"
        )
    place = command if command in FLAGS else "mstplan, before the name of a command,"
    return f"{place} has no option {typed}.\nIt is one of mstplan {whose}." if whose else None


def _commands_with(flags: set[str]) -> str:
    return ", ".join(name for name, own in FLAGS.items() if flags <= own)


def process() -> None:
    """`main` as a process of its own, which may skip what only matters to processes that live on."""
    gc.disable()  # collecting the many objects that imports make is wasted time here
    open_streams()
    code: object = 0
    try:
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
    except Unwritten as e:
        code = (
            141 if e.gone else 2
        )  # 141: as for a process that SIGPIPE ended; what a reader that left, as `head` does, expects
        if not e.gone:
            complain(f"cannot write the answer: {e.reason}")
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # noqa: BLE001  a defect of mstplan's: say where
        sys.excepthook(*sys.exc_info())
        code = 70  # EX_SOFTWARE
    if f"{__name__}.processes" in sys.modules:  # it has semaphores to give back
        raise SystemExit(code)
    os._exit(
        code if isinstance(code, int) else int(code is not None)
    )  # all is written; tearing down takes as long as answering
