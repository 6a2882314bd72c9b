"""Processes that measure, and where they come from: begun anew, or forked from one that has imported torch already. No torch here.

A process is asked by arguments and by its input, answers with one line, and ends when its input does, that is, with the process that
asked it. Whichever way it begins, it runs worker.py's `answer`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import one_line
from ..spec.hardware import ALLOCATORS, EXPANDABLE

_PACKAGE = Path(__file__).parents[1]
_PROGRAM = f"""
import sys
sys.path = [folder for folder in sys.path if folder]  # not the current one, and whatever random.py lies there
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("mstplan", {str(_PACKAGE / "__init__.py")!r}, submodule_search_locations=[{str(_PACKAGE)!r}])
sys.modules["mstplan"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["mstplan"])
from mstplan.measuring.worker import main
main()
"""
WORKER_COMMAND = (sys.executable, "-c", _PROGRAM)
"""How a process starts that measures: with this very mstplan, wherever it was found. `python -m` would take the current folder for a place
to look for modules."""
CAN_FORK = sys.platform == "linux"
"""Elsewhere there is no fork (Windows), or none that is safe once libraries are loaded (macOS)."""
_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The old and the new name of those settings."""
_LAST_SECONDS = 10
"""What a process may take to end once it has answered. Tearing CUDA down takes seconds."""


def process_environment(device: str, allocator: str | None = None) -> dict[str, str]:
    """Environment variables of a process that measures. On CUDA with the allocator that a case asks for; where it asks for none, with
    expandable segments, as predictions assume and most long runs want, unless the user has set the allocator up. A place without a name
    in PYTHONPATH would be the current folder."""
    variables = dict(os.environ)
    if "PYTHONPATH" in variables:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, variables["PYTHONPATH"].split(os.pathsep)))
    if device == "cuda" and allocator is not None:
        for name in _VARIABLES:
            variables.pop(name, None)
        if ALLOCATORS[allocator]:
            variables["PYTORCH_CUDA_ALLOC_CONF"] = ALLOCATORS[allocator]
    elif device == "cuda" and "PYTORCH_ALLOC_CONF" not in variables:
        variables.setdefault("PYTORCH_CUDA_ALLOC_CONF", ALLOCATORS[EXPANDABLE])
    return variables


def allocator_settings(variables: Mapping[str, str]) -> str:
    """Settings of the allocator in a process with these environment variables, as torch reads them."""
    return next(filter(None, map(variables.get, _VARIABLES)), None) or ""


class Process:
    """A process that has been asked, and is to write one line. It lives while its input is open."""

    def __init__(
        self, pid: int, pipes: _Pipes, wait: Callable[[float], int | None], kill: Callable[[], object] | None = None
    ):
        """wait: gives the exit code (less than 0: of a signal; None: nobody knows) after so many seconds at most, and kills it then."""
        self.pid, self._pipes, self._wait = pid, pipes, wait
        self._kill = kill or (lambda: _kill(pid))
        self._answer = bytearray()

    def fileno(self) -> int:
        """What can be read once there is more of the answer, or the process has ended: for `select`."""
        return self._pipes.answer

    def ask(self, request: bytes) -> None:
        with suppress(BrokenPipeError):  # it has ended, which its exit code will tell
            self._pipes.write(request)

    def read(self) -> bool:
        """Read what is there of the answer. False: that was all of it."""
        part = os.read(self._pipes.answer, 1 << 16)
        self._answer += part
        return bool(part)

    def read_all(self) -> None:
        while self.read():
            pass

    def end(self, at_once: bool = False) -> tuple[bytes, int | None, str]:
        """The answer, the exit code, and what was written to stderr, once the process has ended. at_once: do not wait for it."""
        code = self._wait(0 if at_once else _LAST_SECONDS)
        return bytes(self._answer), code, self._pipes.close()

    def stop(self) -> None:
        """End the process without a word to who forked it, as a conversation with that may have been interrupted."""
        self._kill()
        self._pipes.close()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class _Pipes:
    """What a process reads (`input`), writes (`answer`), and says to stderr; and the process's own ends of it."""

    def __init__(self) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  `close` closes it
        reading, self.input = os.pipe()
        self.answer, writing = os.pipe()
        self.of_process = (reading, writing, self._errors.fileno())

    def write(self, request: bytes) -> None:
        while request:
            request = request[os.write(self.input, request) :]

    def hand_over(self) -> None:
        """Close the ends that a process has taken."""
        for end in self.of_process[:2]:
            os.close(end)

    def close(self) -> str:
        """Close one's own ends. Gives what the process wrote to stderr."""
        os.close(self.input)
        os.close(self.answer)
        with self._errors:
            self._errors.seek(0)
            return self._errors.read().decode(errors="replace")


def _begin_anew(arguments: Sequence[str], variables: Mapping[str, str], pipes: _Pipes) -> Process:
    reading, writing, errors = pipes.of_process
    child = subprocess.Popen([*WORKER_COMMAND, *arguments], stdin=reading, stdout=writing, stderr=errors, env=variables)

    def wait(seconds: float) -> int:
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    return Process(child.pid, pipes, wait, lambda: wait(0))


class NoForkError(Exception):
    """Why no process can be forked."""


class _ForkServer:
    """A process that imports torch and transformers, never touches CUDA, and forks others: worker.py's `serve`. Messages are JSON."""

    def __init__(self, variables: Mapping[str, str]):
        """Raises NoForkError."""
        self._socket, its_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_socket, tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                [*WORKER_COMMAND, "serve"],
                stdin=its_socket.fileno(),
                stdout=errors,
                stderr=errors,
                # torch then asks the driver's management library whether there is CUDA, which initialises nothing
                env={**variables, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            )
            its_socket.close()  # so that its end is heard
            try:
                self._hear()
            except NoForkError as e:
                errors.seek(0)
                self.close()
                raise NoForkError(str(e) or last_line(errors.read().decode(errors="replace"))) from None
            except BaseException:
                self.close()
                raise

    def _hear(self) -> Any:
        try:
            message = self._socket.recv(1 << 16)
            reply = json.loads(message) if message else {"error": ""}
        except (OSError, ValueError):
            reply = {"error": ""}
        if "error" in reply:
            raise NoForkError(reply["error"])
        return reply["ok"]

    def begin(self, arguments: Sequence[str], pipes: _Pipes) -> Process:
        """Raises NoForkError."""
        try:
            socket.send_fds(self._socket, [json.dumps({"begin": list(arguments)}).encode()], pipes.of_process)
        except OSError:
            raise NoForkError("the process that forks others has ended") from None
        pid = self._hear()
        return Process(pid, pipes, lambda seconds: self._wait(pid, seconds))

    def _wait(self, pid: int, seconds: float) -> int | None:
        try:
            self._socket.send(json.dumps({"wait": pid, "seconds": seconds}).encode())
            code: int = self._hear()
        except (OSError, NoForkError):  # who forked it is gone
            _kill(pid)
            return None
        return code

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


class Processes:
    """Begins processes that measure, while the context lasts: forked where that can be, each begun anew elsewhere, which takes seconds
    of imports. why_anew: why they are not forked; empty where they are."""

    def __init__(self) -> None:
        self.why_anew = "" if CAN_FORK else f"there is no safe fork on {sys.platform}"
        self._servers: dict[frozenset[tuple[str, str]], _ForkServer] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.close()
        self._servers.clear()

    def begin(self, arguments: Sequence[str], variables: Mapping[str, str]) -> Process:
        """Begin a process with these environment variables, which settings of the allocator are read from once only."""
        pipes = _Pipes()
        try:
            process = self._fork(arguments, variables, pipes) or _begin_anew(arguments, variables, pipes)
        except BaseException:
            pipes.hand_over()
            pipes.close()
            raise
        pipes.hand_over()
        return process

    def _fork(self, arguments: Sequence[str], variables: Mapping[str, str], pipes: _Pipes) -> Process | None:
        if self.why_anew:
            return None
        key = frozenset(variables.items())
        try:
            if key not in self._servers:
                self._servers[key] = _ForkServer(variables)
            return self._servers[key].begin(arguments, pipes)
        except NoForkError as e:
            self.why_anew = str(e) or "the process that forks others has ended"
            return None


def describe_death(code: int | None, error_text: str) -> str:
    """Reason why a process ended without an answer."""
    if code is None:
        return f"ended, and so did the process that forked it. {last_line(error_text)}".rstrip()
    if code == -signal.SIGKILL:
        return "killed (SIGKILL): by hand, or by the system for want of CPU RAM"
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}. {last_line(error_text)}".rstrip()
    return f"ended with code {code}. {last_line(error_text)}".rstrip()


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(lines[-1], 300) if lines else ""
