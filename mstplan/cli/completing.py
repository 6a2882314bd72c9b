"""Completion in a shell: what could be typed next, the scripts with which bash, zsh and fish ask for it, and where these lie.

A script runs mstplan with $_MSTPLAN_COMPLETE set, as click's do: the words are in $COMP_WORDS, which of them is being typed in
$COMP_CWORD. What is offered is read from the commands' own options; typer is told of none of them. No torch.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import INSTALL, SHOW, declarations
from .commands import OPTIONS, Option

VARIABLE = "_MSTPLAN_COMPLETE"
OF_NO_COMMAND = ("--help", "--version", SHOW, INSTALL)
_FILES = ("MODEL", "FILE", "RESULTS")
"""What options are called in help whose values may be files."""


class Offer(NamedTuple):
    """What could be typed. kind: plain; file or dir: the shell looks for some that begin so."""

    kind: str
    text: str
    about: str = ""


# ---- what is offered ------------------------------------------------------------------------------------------------------


def offers(before: Sequence[str], typed: str) -> list[Offer]:
    """What the word `typed` could become, behind the words `before` it, without the program's name."""
    command = next((word for word in before if not word.startswith("-")), None)
    commands = declarations(command)
    if before and before[-1] in (SHOW, INSTALL):
        return _begun(SHELLS, typed)
    if command is None:
        return _begun(OF_NO_COMMAND if typed.startswith("-") else commands, typed)
    return _of_command(OPTIONS[command], [*before], typed) if command in OPTIONS else []


def _of_command(options: Mapping[str, Option], before: list[str], typed: str) -> list[Offer]:
    """A value where an option waits for one, else an option, or a file where the command takes some."""
    flags = {flag: one for one in options.values() if not one.stands_alone for flag in one.flags}
    if typed == "=" and before[-1] in flags:  # bash has --gpu=h as three words
        typed = ""
    elif before[-1] == "=":
        before.pop()
    if (one := flags.get(before[-1])) is not None and one.kind is not bool:
        return _values(one, typed)
    flag, equals, value = typed.partition("=")
    if equals and flag in flags and flags[flag].kind is not bool:
        return [each._replace(text=f"{flag}={each.text}") for each in _values(flags[flag], value)]
    if not typed.startswith("-") and any(one.stands_alone for one in options.values()):
        return [Offer("file", typed)]
    return [*_flags(options, before, typed), *([Offer("plain", "--help")] if "--help".startswith(typed) else [])]


def _flags(options: Mapping[str, Option], before: Sequence[str], typed: str) -> Iterator[Offer]:
    """Long options, but for those that are given already and are so once."""
    for one in options.values():
        present = any(flag in before for flag in one.flags)
        if not one.stands_alone and one.flags[0].startswith(typed) and (one.adds_up or not present):
            yield Offer("plain", one.flags[0], _first_sentence(one.help() if callable(one.help) else one.help))


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].split(": ")[0].strip(".")[:60]


def _values(one: Option, typed: str) -> list[Offer]:
    """Values of an option, of several with commas between the last; files where it takes some and no name begins so."""
    head, comma, last = typed.rpartition(",")
    if one.choices is not None:
        names = [name for name in one.choices() if name not in head.split(",")]
        if offers_of_names := _begun(names, last):
            return [each._replace(text=f"{head}{comma}{each.text}") for each in offers_of_names]
    called = str(one.more.get("metavar", one.flags[0])).split("[")[0]
    if called == "FOLDER":
        return [Offer("dir", typed)]
    return [Offer("file", typed)] if called in _FILES else []


def _begun(names: Iterable[str], typed: str) -> list[Offer]:
    return [Offer("plain", name) for name in names if name.startswith(typed)]


# ---- how shells ask, and are answered -------------------------------------------------------------------------------------


def _split(text: str) -> list[str]:
    """Words of a line; a quote may still be open."""
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    try:
        words.extend(iter(lexer))
    except ValueError:
        words.append(lexer.token or "")
    return words


def _by_number(line: str, place: str) -> tuple[list[str], str]:
    """The words before the one that is typed, and that one: bash and zsh say its number."""
    words, n = _split(line), int(place)
    return words[1:n], words[n] if n < len(words) else ""


def _by_word(line: str, typed: str) -> tuple[list[str], str]:
    """The same for fish, which says the word itself."""
    words = _split(line)[1:]
    return words[:-1] if typed and words and words[-1] == _unquoted(typed) else words, _unquoted(typed)


def _unquoted(typed: str) -> str:
    return next(iter(_split(typed)), "")


_BASH = """\
_mstplan_completion() {
    local IFS=$'\\n' response line
    response=$(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD _MSTPLAN_COMPLETE=bash_complete "$1")
    COMPREPLY=()
    for line in $response; do
        case $line in
            plain,*) COMPREPLY+=("${line#plain,}") ;;
            file,*) compopt -o default 2> /dev/null ;;
            dir,*) compopt -o dirnames 2> /dev/null ;;
        esac
    done
}
complete -o nosort -F _mstplan_completion mstplan 2> /dev/null || complete -F _mstplan_completion mstplan
"""
_ZSH = """\
#compdef mstplan
_mstplan_completion() {
    local -a plain described response
    local type text about
    (( ! $+commands[mstplan] )) && return 1
    response=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) _MSTPLAN_COMPLETE=zsh_complete mstplan)}")
    for type text about in ${response}; do
        if [[ $type == plain && $about == _ ]]; then plain+=("$text")
        elif [[ $type == plain ]]; then described+=("${text//:/\\\\:}:$about")
        elif [[ $type == file ]]; then _path_files -f
        elif [[ $type == dir ]]; then _path_files -/
        fi
    done
    (( $#described )) && _describe -V unsorted described -U
    (( $#plain )) && compadd -U -V unsorted -a plain
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _mstplan_completion "$@"
else
    compdef _mstplan_completion mstplan
fi
"""
_FISH = """\
function _mstplan_completion
    set -l response (env _MSTPLAN_COMPLETE=fish_complete COMP_WORDS=(commandline -cp) COMP_CWORD=(commandline -t) mstplan)
    for line in $response
        set -l parts (string split -m 1 "," -- $line)
        switch $parts[1]
            case plain
                echo $parts[2]
            case file
                __fish_complete_path $parts[2]
            case dir
                __fish_complete_directories $parts[2]
        end
    end
end
complete --no-files --command mstplan --arguments "(_mstplan_completion)"
"""


class Shell(NamedTuple):
    """A shell: its script, how it asks, how it is answered, and the file that it reads when it starts."""

    script: str
    asks: Callable[[str, str], tuple[list[str], str]]
    answer: Callable[[Offer], str]
    place: Callable[[Path], Path]  # of the script, in the user's home
    starts: Callable[[Path], Path | None] = lambda _home: None
    line: str = ""  # of the file that it reads when it starts; {} is the script


SHELLS: dict[str, Shell] = {
    "bash": Shell(
        _BASH,
        _by_number,
        lambda offer: f"{offer.kind},{offer.text}",
        lambda home: home / ".bash_completions" / "mstplan.sh",
        lambda home: home / ".bashrc",
        "source {}",
    ),
    "zsh": Shell(
        _ZSH,
        _by_number,
        lambda offer: f"{offer.kind}\n{offer.text}\n{offer.about or '_'}",
        lambda home: home / ".zfunc" / "_mstplan",
        lambda home: Path(os.environ.get("ZDOTDIR") or home) / ".zshrc",
        "fpath+=~/.zfunc; autoload -Uz compinit; compinit",
    ),
    "fish": Shell(
        _FISH,
        _by_word,
        lambda offer: f"{offer.kind},{offer.text}" + (f"\t{offer.about}" if offer.about else ""),
        lambda home: Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "fish/completions/mstplan.fish",
    ),
}


def answer(request: str) -> str:
    """What a script is answered: a line and more for each offer. `request` is $_MSTPLAN_COMPLETE, such as bash_complete; nothing is
    offered where something is not understood."""
    from ..errors import MstplanError

    shell = SHELLS.get(request.partition("_")[0])
    try:
        if shell is None or request.partition("_")[2] != "complete":
            return ""
        before, typed = shell.asks(os.environ.get("COMP_WORDS", ""), os.environ.get("COMP_CWORD", ""))
        return "".join(f"{shell.answer(offer)}\n" for offer in offers(before, typed))
    except (MstplanError, ValueError):
        return ""


# ---- --show-completion and --install-completion ---------------------------------------------------------------------------


def run(words: Sequence[str]) -> str:
    """Do what --show-completion or --install-completion asks for, the first of these words; gives what is said of it. Raises an
    InputError."""
    flag, _, named = words[0].partition("=")
    name = named or next(iter(words[1:]), "") or Path(os.environ.get("SHELL", "")).name
    shell = SHELLS.get(name)
    if shell is None:
        from ..errors import InputError, did_you_mean, quoted

        raise InputError(f"unknown shell {quoted(name)}.{did_you_mean(name, SHELLS)}\nKnown: {', '.join(SHELLS)}.")
    return shell.script if flag == SHOW else "".join(f"wrote {path}\n" for path in install(shell)) + _OPEN


_OPEN = "Open a new shell, and press the tab key.\n"


def install(shell: Shell) -> list[Path]:
    """Put the script where the shell looks for it; gives the files that were written. Raises OutputError."""
    from .. import files
    from ..errors import OutputError

    try:
        home = Path.home()
    except RuntimeError:
        raise OutputError("there is no home folder to put the script in.\n--show-completion prints it.") from None
    place, starts = shell.place(home), shell.starts(home)
    with files.refusing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    files.write(place, shell.script.encode())
    return [
        place,
        *([starts] if starts is not None and _add_line(starts, shell.line.format(shlex.quote(str(place)))) else []),
    ]


def _add_line(path: Path, line: str) -> bool:
    """Whether the file had to be changed to have this line."""
    from .. import files

    with files.refusing(path):
        before = path.read_bytes() if path.exists() else b""
    if line.encode() in before.splitlines():
        return False
    files.write(path, before + (b"\n" if before and not before.endswith(b"\n") else b"") + line.encode() + b"\n")
    return True
