"""Commands: options in one namespace, declared for typer only when they are asked for, errors as lines and exit codes."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

os.environ.setdefault(
    "PYDANTIC_DISABLE_PLUGINS", "__all__"
)  # looking for plugins reads every installed package's metadata

import typer

from .output import complain, settled

app = typer.Typer(
    name="mstplan",
    help="How long a sequence can I train on this GPU, with which settings, and how sure is that?",
    epilog="Start with:  mstplan max-seq --model llama3.1-8b --gpu-mem 80GB",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Asked = SimpleNamespace
"""What the options of a command were given."""


class Option(NamedTuple):
    """What a command may be given. Whatever takes a value is declared to typer as a list: given twice, none is lost without a word."""

    annotation: Any
    default: Any
    flags: tuple[str, ...]  # of what has no flag its name
    adds_up: bool = False
    told: Callable[[], str] | None = None  # its help, where that is of the moment

    @property
    def declared(self) -> inspect.Parameter:
        if self.told is not None:
            self.annotation.__metadata__[0].help = self.told()
        listed = self.default is not None and self.default is not ... and not isinstance(self.default, bool)
        return inspect.Parameter(
            "_",
            inspect.Parameter.KEYWORD_ONLY,
            default=[self.default] if listed else self.default,
            annotation=self.annotation,
        )

    def value(self, given: Any) -> Any:
        """Of what typer hands over. Raises InputError for different values where one is taken."""
        if not isinstance(given, list) or not self.flags[0].startswith("-"):
            return self.default if given is None or given == [] else given
        values = list(dict.fromkeys(given))
        if len(values) > 1 and not self.adds_up:
            from ..errors import InputError, quoted

            raise InputError(
                f"{self.flags[0]} is given twice: {quoted(values[0])} and {quoted(values[1])}.\nGive it once."
            )
        return ",".join(values) if len(values) > 1 else values[0] if values else self.default


def option(
    kind: Any,
    flags: str,
    help: str | Callable[[], str],
    default: Any = None,
    panel: str | None = None,
    adds_up: bool = False,
    **more: Any,
) -> Option:
    """An option that `command` takes; typer shows its default unless `help` tells of one. help: a function where it lists what a registry
    holds. adds_up: several values with commas between, and given several times all of them."""
    told = None if isinstance(help, str) else help
    said = help if isinstance(help, str) else help()
    declared = typer.Option(
        *flags.split(), help=said, rich_help_panel=panel, show_default="Default" not in said, **more
    )
    taken = kind if kind is bool else list[getattr(kind, "__args__", (kind,))[0]]  # type: ignore[misc]  # of `str | None` str
    return Option(Annotated[taken, declared], default, tuple(flags.replace("/", " ").split()), adds_up, told)


def arguments(kind: Any, name: str, help: str) -> Option:
    """Any number of values without a flag."""
    return Option(Annotated[list[kind], typer.Argument(help=help, metavar=name, show_default=False)], None, (name,))


COMMANDS: dict[str, Callable[[], object]] = {}
"""How to add each command to `app`: done for the one that was asked for only, as typer takes a while over each."""
FLAGS: dict[str, set[str]] = {}
"""The options of each command."""


def command(
    name: str, *groups: dict[str, Option], help: str, epilog: str
) -> Callable[[Callable[[Asked], None]], Callable[[Asked], None]]:
    """Register a command that takes the options of `groups` in one namespace; its errors become lines and exit codes."""
    options = {key: one for group in groups for key, one in group.items()}

    def register(run: Callable[[Asked], None]) -> Callable[[Asked], None]:
        def called(**given: Any) -> None:
            from ..errors import MstplanError

            try:
                values = {key: one.value(given.get(key)) for key, one in options.items()}
                missing = next(
                    (o for key, o in options.items() if o.default is ... and values[key] in (None, ...)), None
                )
                if missing is not None:  # some releases of typer and click together do not notice
                    flags = " / ".join(f"'{flag}'" for flag in missing.flags)
                    complain(f"Missing option {flags}.\nTry 'mstplan {name} --help'.")
                    raise typer.Exit(2)
                run(settled(Asked(**values)))
            except MstplanError as e:
                complain(str(e))
                raise typer.Exit(2) from None

        def add() -> None:
            built = _asked_for(options, sys.argv[1:])
            called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
                [one.declared.replace(name=key) for key, one in built.items()]
            )
            called.__annotations__ = {key: one.annotation for key, one in built.items()}
            app.command(name, help=help, epilog=epilog)(called)

        COMMANDS[name] = add
        FLAGS[name] = {flag for one in options.values() for flag in one.flags}
        return run

    return register


def _asked_for(options: dict[str, Option], arguments: list[str]) -> dict[str, Option]:
    """The options that the arguments name, and the required ones: typer takes a while over each. All of them when an
    argument is none of them, be it --help or a slip to complain about."""
    named = {a.split("=")[0] if a.startswith("--") else a[:2] for a in arguments if a.startswith("-")}
    if not named <= {flag for one in options.values() for flag in one.flags}:
        return options
    always = {key for key, one in options.items() if one.default is ... or not one.flags[0].startswith("-")}
    return {key: one for key, one in options.items() if key in always or not named.isdisjoint(one.flags)}
