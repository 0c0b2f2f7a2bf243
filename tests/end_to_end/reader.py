"""Somebody who does what a page says, block by block, in a folder of their own.

Shell blocks are run by bash. `compress` on its PATH is a small program that hands its arguments to
this process, which runs the command line itself: a new process spends seconds on imports. `pip`
and `make` are looked up, not run. Every host name leads to the tests' own sshd, at whose other end
are a real Python, an imitation of trtexec, and programs of boards that only check what they get.
"""

import __future__

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tomli_w
import yaml
from compressor.cli import main

import compressor
from compressor.bench import DESIGN
from compressor.latency import probe
from compressor.latency.host import end_group
from compressor.latency.ssh import devices_file, find_device
from compressor.latency.timing import FINAL, FINALIST, TRIAL
from tests.device.conftest import Board
from tests.device.imitation_trtexec import install
from tests.end_to_end.pages import (
    OUTPUT,
    PYTHON,
    ROOT,
    SHELL,
    TOML,
    YAML,
    Block,
    extras,
    make_targets,
    requirements,
)  # fmt: skip

NOT_MET = 3
OF_OTHERS = ("ultralytics",)  # packages of pages, on which nothing depends
MAX_TRIALS, MAX_EPOCHS, MAX_SIDE = 1, 1, 32
SMALL = {
    "trials": MAX_TRIALS, "fine-tune-epochs": MAX_EPOCHS, "finalists": 1, "least-squares": False,
    "recalibration-images": 32,
}  # fmt: skip
MEANT_BY_DOTS = {"--arch": "my_package.my_module:make_net", "--data": "images/"}

CLIENT = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = [os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd()]
    server.sendall(json.dumps(request).encode())
    server.shutdown(socket.SHUT_WR)
    answer = json.loads(b"".join(iter(lambda: server.recv(65536), b"")))
sys.stderr.write(answer["stderr"])
sys.stdout.write(answer["stdout"])
sys.exit(answer["code"])
"""
SSH = """\
#!/bin/sh
# The user's own ssh; names of users are left out, and names of hosts lead to the tests' sshd.
n=$#
while [ "$n" -gt 0 ]; do
  word=$1; shift; n=$((n - 1))
  case $word in
    -l) shift; n=$((n - 1)); continue ;;
    *\\ *) ;;
    *@*) word=${{word#*@}} ;;
  esac
  set -- "$@" "$word"
done
exec {ssh} -F {config} "$@"
"""
LOCAL_PYTHON = """\
#!/bin/sh
case "$*" in
  "-m venv "*) exec {python} -m venv --without-pip "$3" ;;
  samples/serve_onnx.py*) exec {tools}/serve "$@" ;;
esac
PYTHONPATH={root} exec {python} "$@"
"""
BOARD_PYTHON = """\
#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && exec ln -s {tools}/pip "$3/bin/pip" ;;
esac
exec {python} "$@"
"""
# Programs that must not be run here: which arguments they take, as a pattern of `case`.
CHECKED_HERE = {"ssh-keygen": "'-t ed25519'", "ssh-copy-id": "[a-z]*@[a-z]*.local"}
CHECKED_THERE = {
    "jetson_clocks": "''|--show|--store|--restore",
    "nvidia-smi": "-L|'-pm 1'|'-lgc '[0-9]*",
    "tee": "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
}
ANSWERS = {  # those that are asked for something: arguments, answer
    "vcgencmd": ("get_throttled", "throttled=0x0"),
    "nvpmodel": ("-q|'-m '[0-9]", "NV Power Mode: MAXN"),
}
MEASURING = {  # enough to tell that it works; the figures are nobody's
    "min_pairs": 4, "max_pairs": 40, "budget_s": 8.0, "half_width": 0.1, "pair_s": 0.04,
    "min_rounds": 8, "n_warmup": 2, "limit_s": None,
}  # fmt: skip


@contextlib.contextmanager
def measuring_in_a_hurry() -> Iterator[None]:
    """Every kind of measurement takes as little time as it can; the values are frozen.

    The networks of the pages stand for trained ones, and the images for those that they know.
    """
    efforts = (TRIAL, FINAL, FINALIST, DESIGN, probe.EFFORT)
    before = [dict(vars(effort)) for effort in efforts]
    for effort in efforts:
        vars(effort).update(MEASURING)
    try:
        with mock.patch("compressor.trials.check_better_than_chance"):
            yield
    finally:
        for effort, values in zip(efforts, before, strict=True):
            vars(effort).update(values)


class Reader:
    """Follows one page."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Moves into `folder`, which holds what the page takes for granted."""
        monkeypatch.setattr(probe, "WIDTHS", (8, 16, 32))
        self.folder = folder
        self.home, self.tools = folder.parent / "home", folder.parent / "tools"
        self.tools.mkdir()
        self.ports: dict[str, int] = {}  # as the page names them -> as they are
        self._servers: list[subprocess.Popen[str]] = []
        self._socket_folder = tempfile.TemporaryDirectory(prefix="pages")  # its path is short
        self._listener = socket.socket(socket.AF_UNIX)
        address = f"{self._socket_folder.name}/s"
        self._listener.bind(address)
        self._listener.listen()
        self._write_tools(address)
        for name, where in (("CONFIG", ".config"), ("CACHE", ".cache")):
            monkeypatch.setenv(f"XDG_{name}_HOME", str(self.home / where))
        monkeypatch.setenv("PATH", f"{self.tools}:{os.environ['PATH']}")
        monkeypatch.setattr("compressor.search.dashboard.Dashboard.serve", _asked_once)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.chdir(folder)
        self._modules = set(sys.modules)

    def close(self) -> None:
        """Ends what still runs, and forgets what was imported from the folder."""
        self._listener.close()
        self._socket_folder.cleanup()
        for server in self._servers:
            server.kill()
            server.communicate()
        for name in set(sys.modules) - self._modules:
            if str(self.folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]

    def use(self, board: Board) -> None:
        """From now on every host is this one; commands there start in a home of its own."""
        with (board.folder / "sshd_config").open("a") as config:
            config.write(f'ForceCommand cd {board.home} && eval "$SSH_ORIGINAL_COMMAND"\n')
        board.power_off()
        board.boot()
        board.write_client_config(HostName="127.0.0.1", Port=str(board.port))
        _program(
            self.tools,
            "ssh",
            SSH.format(ssh=shutil.which("ssh"), config=board.folder / "ssh_config"),
        )

    def follow(self, block: Block) -> None:
        """Does what the block says; whatever goes wrong is raised."""
        HANDLERS[block.kind](self, block)

    def _write_tools(self, address: str) -> None:
        client = CLIENT.format(python=sys.executable, address=address)
        for name in ("compress", "pip", "make", "serve"):
            _program(self.tools, name, client)
        for name, allowed in CHECKED_HERE.items():
            _program(self.tools, name, _checking(name, allowed, ""))
        python = LOCAL_PYTHON.format(python=sys.executable, tools=self.tools, root=ROOT)
        for name in ("python", "python3"):
            _program(self.tools, name, python)

    def shell(self, block: Block) -> None:
        """Runs it by bash, which stops at the first line that fails."""
        self.run_bash(block.commands(), str(block))

    def run_bash(self, script: str, where: str) -> None:
        """Runs `script`, and answers the programs that hand their work to this process."""
        with tempfile.TemporaryFile("w+") as output:
            bash = subprocess.Popen(
                ["bash", "-eo", "pipefail", "-c", script], cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=os.environ | {"BASH_ENV": "", "HOME": str(self.home)}, start_new_session=True,
            )  # fmt: skip
            try:
                self._listener.settimeout(0.05)
                while bash.poll() is None:
                    with contextlib.suppress(TimeoutError):
                        self._answer(self._listener.accept()[0])
            finally:
                end_group(bash)
            output.seek(0)
            said = output.read()
        assert bash.returncode == 0, f"{where} ended with {bash.returncode}:\n{script}\n{said}"

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(10)
            request = b"".join(iter(lambda: connection.recv(65536), b""))
            name, args, cwd = json.loads(request)
            out, err = io.StringIO(), io.StringIO()
            told = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
            with contextlib.chdir(cwd), told[0], told[1]:
                code = PROGRAMS[name](self, args)
            answer = {"stdout": out.getvalue(), "stderr": err.getvalue(), "code": code}
            with contextlib.suppress(BrokenPipeError):  # bash was stopped meanwhile
                connection.sendall(json.dumps(answer).encode())

    def compress(self, args: list[str]) -> int:
        """The command line, with less effort; the network here need not reach a page's limit."""
        try:
            main(affordable(args))
        except SystemExit as ended:
            code = int(ended.code or 0)
        else:
            code = 0
        return 0 if code == NOT_MET and args[0] != "measure" else code

    def pip(self, args: list[str]) -> int:
        """Only what is there is installed: extras and packages that pyproject.toml knows."""
        assert args[0] == "install", args
        for word in args[1:]:
            found = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", word)
            if found:
                assert set((found[1] or "").split(",")) - {""} <= extras(), word
            else:
                assert word in ("-e", *OF_OTHERS) or word in requirements(), word
        return 0

    def make(self, args: list[str]) -> int:
        """A target of the Makefile."""
        assert set(args) <= make_targets(), args
        return 0

    def serve(self, args: list[str]) -> int:
        """A server, which goes on in the background as in another terminal, at a free port."""
        named = args[args.index("--port") + 1]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.ports[named] = free.getsockname()[1]
        args[args.index("--port") + 1] = str(self.ports[named])
        server = subprocess.Popen(
            [sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._servers.append(server)
        assert server.stdout is not None
        return 0 if server.stdout.readline().startswith("http://") else 1

    def python(self, block: Block) -> None:
        """Executes it, and keeps it where it is a whole file."""
        if block.file:
            (self.folder / block.file).write_text(block.content)
        source = block.content
        for named, port in self.ports.items():
            source = source.replace(f"localhost:{named}", f"localhost:{port}")
        flags = __future__.annotations.compiler_flag  # the names in a signature are anybody's
        code = compile(source, str(block), "exec", flags=flags, dont_inherit=True)
        exec(code, {"__name__": "page", "__file__": str(block)})

    def toml(self, block: Block) -> None:
        """Loads it as what it is, and puts it where it belongs."""
        content = tomllib.loads(block.content)
        if "runtime" in content:
            assert block.file, f"{block}: a profile needs a name in its first line"
            (self.folder / block.file).write_text(block.content)
            compressor.load_target(block.file)
        elif all(isinstance(each, dict) and "address" in each for each in content.values()):
            devices_file().parent.mkdir(parents=True, exist_ok=True)
            devices_file().write_text(block.content)
            for name in content:
                find_device(name)
        else:
            (self.folder / "compress.toml").write_text(block.content)
            compressor.load_config(self.folder / "model.pt", {})
            small = dict(SMALL)
            if "image-size" in content:
                small["image-size"] = min(content["image-size"], MAX_SIDE)
            (self.folder / "compress.toml").write_text(tomli_w.dumps(content | small))

    def yaml(self, block: Block) -> None:
        """Runs the commands of a pipeline of GitLab or GitHub, in order."""
        content = yaml.safe_load(block.content)
        jobs = content["jobs"].values() if "jobs" in content else content.values()
        lines = [line for job in jobs for line in _script_of(job)]
        assert lines, f"{block}: a pipeline without a command"
        self.run_bash("\n".join(lines), str(block))

    def output(self, block: Block) -> None:
        """Nothing is to be done with what a program printed."""
        assert block.content.strip(), f"{block}: nothing"


def board_tools(folder: Path, tools: Path) -> Path:
    """What a board has on its PATH, and this machine has not; `tools` has a reader's own."""
    folder.mkdir()
    install(folder, "8.2")
    _program(folder, "python3", BOARD_PYTHON.format(python=sys.executable, tools=tools))
    for name, allowed in CHECKED_THERE.items():
        _program(folder, name, _checking(name, allowed, ""))
    for name, (allowed, answer) in ANSWERS.items():
        _program(folder, name, _checking(name, allowed, answer))
    _program(folder, "sudo", '#!/bin/sh\nexec "$@"\n')
    return folder


def affordable(args: list[str]) -> list[str]:
    """`args` with fewer trials and epochs; `...` stands for what the page has said before."""
    words = list(args)
    for flag, most in (("--trials", MAX_TRIALS), ("--fine-tune-epochs", MAX_EPOCHS)):
        if flag in words:
            at = words.index(flag) + 1
            words[at] = str(min(int(words[at]), most))
    if words[-1:] == ["..."]:
        missing = [(k, v) for k, v in MEANT_BY_DOTS.items() if k not in words]
        words = [*words[:-1], *(word for pair in missing for word in pair)]
    return words


def _script_of(job: Any) -> list[str]:
    """Its command lines."""
    if not isinstance(job, dict):
        return []
    steps = [step["run"] for step in job.get("steps", []) if "run" in step]
    return [*job.get("before_script", []), *job.get("script", []), *steps]


def _program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


def _checking(name: str, allowed: str, answer: str) -> str:
    """A program that takes these arguments and no others."""
    return (
        f'#!/bin/sh\ncase "$*" in {allowed}) echo {answer} ;;\n'
        f'*) echo "{name}: not $*" >&2; exit 64 ;;\nesac\n'
    )


def _asked_once(dashboard: Any) -> None:
    """In place of serving for ever: one request, then Ctrl-C."""
    status: list[int] = []

    def ask() -> None:
        with urllib.request.urlopen(dashboard.address, timeout=30) as reply:
            status.append(reply.status)

    browser = threading.Thread(target=ask)
    browser.start()
    dashboard._server.handle_request()
    browser.join()
    assert status == [200]
    raise KeyboardInterrupt


HANDLERS: dict[str, Callable[[Reader, Block], None]] = {
    PYTHON: Reader.python, TOML: Reader.toml, YAML: Reader.yaml, SHELL: Reader.shell,
    OUTPUT: Reader.output,
}  # fmt: skip
PROGRAMS: dict[str, Callable[[Reader, list[str]], int]] = {
    "compress": Reader.compress, "pip": Reader.pip, "make": Reader.make, "serve": Reader.serve,
}  # fmt: skip
