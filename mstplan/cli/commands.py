"""Commands: options in one typed object, declared for typer only when they are asked for, errors as lines and exit codes."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from types import EllipsisType
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, overload

os.environ.setdefault(
    "PYDANTIC_DISABLE_PLUGINS", "__all__"
)  # looking for plugins reads every installed package's metadata

import typer
from typer.core import TyperCommand, TyperGroup

from .output import complain, settle_format

T = TypeVar("T")
PANELS = (None, "GPU", "Measurement", "Recipe", "Adapters", "Coefficients", "Trace")
"""Of options, in the order in which help shows them."""


class Option(NamedTuple):
    """What a command may be given. Whatever takes a value is declared to typer as a list: given twice, none is lost without a word."""

    kind: Any
    flags: tuple[str, ...]  # of what has no flag its name
    help: str | Callable[[], str]  # called when typer is told: choices are read from where they are defined
    default: Any = None  # ...: there is none
    panel: str | None = None
    adds_up: bool = False
    last: bool = False  # of its panel
    choices: Callable[[], Iterable[str]] | None = None  # what a shell offers as its value
    synonyms: Mapping[str, str] = {}  # other words for values, in small letters and digits
    bare: str = ""  # the value where none follows
    more: Mapping[str, Any] = {}  # for typer

    @property
    def stands_alone(self) -> bool:
        return not self.flags[0].startswith("-")

    def declared(self, name: str) -> inspect.Parameter:
        """As typer reads it from a function."""
        text = self.help() if callable(self.help) else self.help
        if self.stands_alone:
            argument = typer.Argument(help=text, metavar=self.flags[0], show_default=False)
            return _parameter(name, Annotated[list[self.kind], argument], None)  # type: ignore[name-defined]
        more = {"rich_help_panel": self.panel, "show_default": "Default" not in text, **self.more}
        switch = self.kind is bool
        if switch:
            more["metavar"] = ""
        option, kind = typer.Option(*self.flags, help=text, **more), bool if switch else list[self.kind]  # type: ignore[name-defined]
        listed = self.default is not None and self.default is not ... and not switch
        return _parameter(name, Annotated[kind, option], [self.default] if listed else self.default)

    def _meant(self, typed: Any) -> Any:
        key = "".join(c for c in typed.lower() if c.isalnum()) if self.synonyms else ""
        return self.synonyms.get(key, typed)

    def value(self, values_typed: Any) -> Any:
        """Of what typer hands over. Raises InputError for different values where one is taken."""
        if self.stands_alone:
            return tuple(values_typed or ())
        if not isinstance(values_typed, list):
            return self.default if values_typed is None else values_typed
        values = list(dict.fromkeys(map(self._meant, values_typed)))
        if len(values) > 1 and not self.adds_up:
            from ..errors import InputError, quoted

            raise InputError(
                f"{self.flags[0]} is given twice: {quoted(values[0])} and {quoted(values[1])}.\nGive it once."
            )
        return ",".join(values) if len(values) > 1 else values[0] if values else self.default


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@overload
def option(
    kind: type[T],
    flags: str,
    help: str | Callable[[], str],
    default: None = None,
    panel: str | None = None,
    adds_up: bool = False,
    last: bool = False,
    choices: Callable[[], Iterable[str]] | None = None,
    synonyms: Mapping[str, str] | None = None,
    bare: str = "",
    **more: Any,
) -> T | None: ...


@overload
def option(
    kind: type[T],
    flags: str,
    help: str | Callable[[], str],
    default: T | EllipsisType,
    panel: str | None = None,
    adds_up: bool = False,
    last: bool = False,
    choices: Callable[[], Iterable[str]] | None = None,
    synonyms: Mapping[str, str] | None = None,
    bare: str = "",
    **more: Any,
) -> T: ...


def option(
    kind: Any,
    flags: str,
    help: str | Callable[[], str],
    default: Any = None,
    panel: str | None = None,
    adds_up: bool = False,
    last: bool = False,
    choices: Callable[[], Iterable[str]] | None = None,
    synonyms: Mapping[str, str] | None = None,
    bare: str = "",
    **more: Any,
) -> Any:
    """An option, as an attribute of a class of Options; to type checkers it is the value that it has there. default: None where nothing need be
    given, ... where something must; typer shows it unless `help` tells of one. adds_up: several values with commas between, and given several
    times all of them. last: shown behind the others. choices: what a shell offers when it completes the value.
    synonyms: other words for values, in small letters and digits. bare: the value where the next word is another option, or none is."""
    return Option(kind, tuple(flags.split()), help, default, panel, adds_up, last, choices, synonyms or {}, bare, more)


def arguments(kind: type[T], name: str, help: str) -> tuple[T, ...]:
    """Any number of values without a flag."""
    taken: Any = Option(kind, (name,), help, ())
    return taken


class Options:
    """What the options of a command were given, each an attribute. A subclass says which there are; one that has several bases takes theirs."""

    def __init__(self, **values: Any) -> None:
        declarations = declared(type(self))
        if not values.keys() <= declarations.keys():
            raise TypeError(f"no such options: {', '.join(values.keys() - declarations.keys())}")
        vars(self).update({name: values.get(name, one.default) for name, one in declarations.items()})

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{name}: what was asked for does not change")

    def changed(self: Taken, **values: Any) -> Taken:
        return type(self)(**{**vars(self), **values})


Taken = TypeVar("Taken", bound=Options)


def declared(taken: type[Options]) -> dict[str, Option]:
    """The options of a class in the order in which help shows them: those of its bases, then its own."""
    own, *bases = taken.__mro__
    names = dict.fromkeys(name for each in (*bases, own) for name, one in vars(each).items() if type(one) is Option)
    options: list[tuple[str, Option]] = [(name, getattr(taken, name)) for name in names]
    return dict(sorted(options, key=lambda each: (PANELS.index(each[1].panel), each[1].last)))


def flags_given(options: Options, names: Iterable[str]) -> list[str]:
    """The flags, of the options of these names, that the command line sets."""
    declarations = declared(type(options))
    return [declarations[name].flags[0] for name in names if getattr(options, name) != declarations[name].default]


# ---- commands -----------------------------------------------------------------------------------------------------------


class _Command(TyperCommand):
    """One whose help ends in examples, a line each: what is broken or joined cannot be pasted."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        typer.echo("\n".join([" Examples:", *(f"   {example}" for example in EXAMPLES[self.name or ""])]))

    def get_help_option(self, ctx: Any) -> Any:
        return _switch(super().get_help_option(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_bare_values(args, OPTIONS[self.name or ""].values()))


def with_bare_values(arguments: Sequence[str], options: Iterable[Option]) -> list[str]:
    """Arguments with a value after each option that may do without one and has none."""
    bare = {flag: one.bare for one in options if one.bare for flag in one.flags}
    filled: list[str] = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="-"):
        filled.append(argument)
        if argument in bare and following.startswith("-"):
            filled.append(bare[argument])
    return filled


class _Group(TyperGroup):
    def get_help_option(self, ctx: Any) -> Any:
        return _switch(super().get_help_option(ctx))


def _switch(option: Any) -> Any:
    """typer's own option, shown without the kind of its value: it takes none."""
    if option is not None:
        option.metavar = ""
    return option


app = typer.Typer(
    name="mstplan",
    cls=_Group,
    help="How long a sequence can I train on this GPU, with which settings, and how sure is that?",
    epilog="Start with:  mstplan max-seq --model llama3.1-8b --gpu-mem 80GB",
    no_args_is_help=True,
    add_completion=False,  # typer's would declare every command: `completing.py` has mstplan's own
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[[], object]] = {}
"""How to add each command to `app`: done for the one that was asked for only, as typer takes a while over each."""
OPTIONS: dict[str, dict[str, Option]] = {}
"""Each command's, by the attribute that has what was given."""
FLAGS: dict[str, set[str]] = {}
"""The options of each command."""
EXAMPLES: dict[str, tuple[str, ...]] = {}
"""What each command's help ends in."""


def command(
    name: str, taken: type[Taken], *, help: str, examples: tuple[str, ...]
) -> Callable[[Callable[[Taken], None]], Callable[[Taken], None]]:
    """Register a command that is called with a `taken` of what its options were given; its errors become lines and exit codes."""
    options = declared(taken)

    def register(run: Callable[[Taken], None]) -> Callable[[Taken], None]:
        def called(**values_typed: Any) -> None:
            from ..errors import MstplanError, RecipeError

            try:
                values = {key: one.value(values_typed.get(key)) for key, one in options.items()}
                missing = next(
                    (o for key, o in options.items() if o.default is ... and values[key] in (None, ...)), None
                )
                if missing is not None:  # some releases of typer and click together do not notice
                    flags = " / ".join(f"'{flag}'" for flag in missing.flags)
                    complain(f"Missing option {flags}.\nTry 'mstplan {name} --help'.")
                    raise typer.Exit(2)
                run(settle_format(taken(**values)))
            except MstplanError as e:
                from ..step.names import in_options

                complain(in_options(str(e)) if isinstance(e, RecipeError) else str(e))
                raise typer.Exit(2) from None

        def add() -> None:
            shown = [one.declared(key) for key, one in _select_options(options, sys.argv[1:]).items()]
            called.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
            called.__annotations__ = {each.name: each.annotation for each in shown}
            app.command(name, cls=_Command, help=help)(called)

        COMMANDS[name] = add
        OPTIONS[name] = options
        FLAGS[name] = {flag for one in options.values() for flag in one.flags}
        EXAMPLES[name] = examples
        return run

    return register


def _select_options(options: dict[str, Option], arguments: list[str]) -> dict[str, Option]:
    """The options that the arguments name, and the required ones: typer takes a while over each. All of them when an
    argument is none of them, be it --help or a slip to complain about."""
    named = {a.split("=")[0] if a.startswith("--") else a[:2] for a in arguments if a.startswith("-")}
    if not named <= {flag for one in options.values() for flag in one.flags}:
        return options
    always = {key for key, one in options.items() if one.default is ... or one.stands_alone}
    return {key: one for key, one in options.items() if key in always or not named.isdisjoint(one.flags)}
