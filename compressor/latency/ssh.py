"""A machine over SSH: the user's own OpenSSH, with the user's own configuration.

Keys, agents, jump hosts and aliases work as they do in a terminal. Nothing is asked (BatchMode),
and the host key is always checked, whatever the configuration says. One connection is opened and
shared (ControlMaster). Every argument is quoted for the shell at the other end.
"""

import hashlib
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import (
    AuthenticationError,
    ConfigError,
    DeviceError,
    DeviceLostError,
    HostKeyError,
    RuntimeMissingError,
    TimeLimitError,
    UnreachableError,
    unknown_name,
)
from compressor.files import read_toml
from compressor.latency.host import Done, answer_of
from compressor.latency.profiles import user_profiles
from compressor.scratch import SHORT, Scratch

SCHEME = "ssh://"
CONNECTION_FAILED = 255  # ssh's own exit status; the remote command's otherwise
TIMED_OUT = (124, 137)  # of timeout(1), where the command ended and where it had to be killed
# Around every command: of one that a signal ends, ssh itself would report what it reports of a
# connection that was lost.
SHELL = ("sh", "-c", '"$@"; exit $?', "sh")
# A server that dies may have told the exit status already, and not yet all that was printed.
END = b"\x04end\n"
SHELL_TO_THE_END = ("sh", "-c", '"$@"; code=$?; printf "\\004end\\n"; exit $code', "sh")
KEPT_DAYS = 7  # what was uploaded, since it was last asked for
# Where files are kept there; those that nobody has asked for in days were left by a host that was
# killed, or belong to a search that has ended.
FIND_CACHE = f"""cache="${{XDG_CACHE_HOME:-$HOME/.cache}}"; echo "$cache"
exec >/dev/null 2>&1; cd "$cache/compressor" || exit 0
find work written-* -type f -mtime +{KEPT_DAYS} -exec rm -f {{}} +
exit 0"""
CONNECT_LIMIT_S = 20.0
UPLOAD_BYTES_PER_S = 250e3  # slower than any network that a search over it makes sense on

# Letters, digits and what names and IPv6 addresses need; nothing that a shell or ssh reads
# otherwise, and no dash in front, which would make an option of it.
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_ADDRESS = re.compile(
    rf"ssh://(?:(?P<user>{_NAME})@)?(?P<host>{_NAME}|\[[0-9A-Fa-f:.%a-z]+\])(?::(?P<port>\d+))?/?"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    """Where a device is.

    Attributes:
        host: Name, alias of the user's ssh configuration, or IP address.
        user: None for the one that ssh's configuration says.
        port: None for the one that ssh's configuration says.
        ssh_config: File that ssh reads in place of the user's own.
        python: What runs Python there.
    """

    host: str
    user: str | None = None
    port: int | None = None
    ssh_config: Path | None = None
    python: str = "python3"

    @property
    def label(self) -> str:
        """For messages."""
        user = f"{self.user}@" if self.user else ""
        return f"{user}{self.host}{f':{self.port}' if self.port else ''}"


def devices_file() -> Path:
    """Where users give their devices names; a table per device, `address` in each."""
    return user_profiles().parent / "devices.toml"


def find_device(device: str) -> Address:
    """The address that `device` means: a URL, or a name from `devices_file()`.

    Raises:
        ConfigError: It is neither, or its table is broken.
    """
    if device.startswith(SCHEME):
        return parse_address(device)
    path = devices_file()
    try:
        table = read_toml(path) if os.path.lexists(path) else {}
    except (OSError, ValueError) as err:
        raise ConfigError(f"{path} cannot be read: {err}.") from err
    if device not in table:
        known = unknown_name("device", device, table) if table else f"Unknown device {device!r}."
        raise ConfigError(
            f"{known} Give ssh://user@host[:port], or the name of a table in {path}."
        )
    entry = table[device]
    keys = {"address": str, "ssh_config": str, "python": str}
    if not isinstance(entry, dict) or "address" not in entry:
        raise ConfigError(f'{path}: [{device}] needs address = "ssh://user@host".')
    for key, value in entry.items():
        if key not in keys or not isinstance(value, keys[key]):
            raise ConfigError(
                f"{path}: [{device}] {key} = {value!r}; expected text under {', '.join(keys)}."
            )
    address = parse_address(entry["address"])
    try:
        config = Path(entry["ssh_config"]).expanduser() if entry.get("ssh_config") else None
    except RuntimeError as err:  # of a user who is not there
        raise ConfigError(f"{path}: [{device}] ssh_config: {err}") from err
    if config is not None and not config.exists():
        raise ConfigError(f"{path}: [{device}] ssh_config: there is no file {config}.")
    return Address(
        address.host, address.user, address.port, config, entry.get("python", "python3")
    )


def parse_address(url: str) -> Address:
    """The parts of `ssh://user@host[:port]`.

    Raises:
        ConfigError: It has another form; nothing that a shell would read gets through.
    """
    match = _ADDRESS.fullmatch(url)
    port = int(match["port"]) if match and match["port"] else None
    if match is None or (port is not None and not 0 < port < 65536):
        raise ConfigError(f"Expected --device ssh://user@host[:port], got {url!r}.")
    return Address(match["host"].strip("[]"), match["user"], port)


class SshHost:
    """A machine over SSH; see `Host`."""

    def __init__(self, address: Address) -> None:
        """Opens the connection.

        Raises:
            UnreachableError: No answer.
            AuthenticationError: It does not let us in.
            HostKeyError: Its key is not the one that is known, or none is.
        """
        if shutil.which("ssh") is None:
            raise RuntimeMissingError("No ssh on this machine; install the OpenSSH client.")
        self.label = address.label
        self._address = address
        # Short, because the path of a socket may have 104 characters.
        self._sockets = Scratch(SHORT, "/tmp")
        self._errors = Path(self._sockets.name) / "stderr"
        try:
            self._connect()
        except DeviceError:
            self._sockets.cleanup()
            raise

    def reconnect(self) -> None:
        """Opens the connection again after it was lost.

        Raises:
            DeviceError: As at the first time.
        """
        self._connect()

    def _connect(self) -> None:
        """Starts the shared connection; it ends by itself a minute after its last use."""
        # The connection stays behind and holds its stderr, so that is a file and no pipe.
        with self._errors.open("wb") as errors:
            master = ("-o", "ControlMaster=auto", "-o", "ControlPersist=60")
            process = subprocess.Popen(
                self._ssh(["sh", "-c", FIND_CACHE], master),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
            try:
                stdout, _ = answer_of(process, self.label, limit_s=3 * CONNECT_LIMIT_S)
            except subprocess.TimeoutExpired as err:
                raise UnreachableError(
                    f"{self.label} did not answer in {3 * CONNECT_LIMIT_S:.0f} s; is it on, and "
                    f"does `ssh {self.label}` work in a terminal?"
                ) from err
        if process.returncode:
            log = self._errors.read_text(encoding="utf-8", errors="replace")
            raise self.refusal(process.returncode, log) or UnreachableError(
                f"{self.label} cannot run sh: {log.strip()}"
            )
        folder = stdout.decode("utf-8", "replace").strip().splitlines()
        if len(folder) != 1 or not folder[0].startswith("/"):
            raise UnreachableError(
                f"{self.label} answered with {stdout[:120]!r} where a path was expected; its "
                f"shell must print nothing when it starts."
            )
        self.cache = f"{folder[0]}/compressor"

    def run(self, command: Sequence[str], *, limit_s: float, stdin: bytes = b"") -> Done:
        """See `Host.run`; the command is ended on the machine too when its time is up."""
        limited = [*SHELL_TO_THE_END, "timeout", "-k", "5", str(math.ceil(limit_s)), *command]
        began = time.monotonic()
        process = subprocess.Popen(
            self._ssh(limited), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            stdout, stderr = answer_of(
                process, self.label, stdin, limit_s=limit_s + CONNECT_LIMIT_S
            )
        except subprocess.TimeoutExpired as err:
            raise DeviceLostError(
                f"{self.label} gave no answer in {limit_s + CONNECT_LIMIT_S:.0f} s."
            ) from err
        if process.returncode == CONNECTION_FAILED:
            lost = self.refusal(process.returncode, stderr.decode("utf-8", "replace"))
            assert lost is not None
            raise lost
        if not stdout.endswith(END):
            raise DeviceLostError(f"The answer of {self.label} to {command[0]} was cut off.")
        stdout = stdout.removesuffix(END)
        ended, killed = TIMED_OUT
        is_late = time.monotonic() - began >= limit_s
        if process.returncode == ended or (process.returncode == killed and is_late):
            raise TimeLimitError(f"{command[0]} did not end in {limit_s:.0f} s on {self.label}.")
        return Done(process.returncode, stdout, stderr)

    def start(self, command: Sequence[str], *, log: Path) -> "subprocess.Popen[bytes]":
        """See `Host.start`; a process that a signal ends exits with 128 + signal."""
        with log.open("wb") as errors:
            return subprocess.Popen(
                self._ssh([*SHELL, *command]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )

    def put(self, content: bytes, name: str) -> str:
        """See `Host.put`; whole or not at all, because a connection may break half-way."""
        path = f"{self.cache}/work/{hashlib.sha256(content).hexdigest()[:32]}-{name}"
        reuse = 'test -f "$1" && touch -c "$1"'
        if self.run(["sh", "-c", reuse, "sh", path], limit_s=CONNECT_LIMIT_S).code == 0:
            return path
        script = (
            'mkdir -p "$(dirname "$1")" && cat > "$1.$$" && [ "$(wc -c < "$1.$$")" -eq "$2" ] '
            '&& mv "$1.$$" "$1" || { rm -f "$1.$$"; exit 9; }'
        )
        limit_s = CONNECT_LIMIT_S + len(content) / UPLOAD_BYTES_PER_S
        done = self.run(
            ["sh", "-c", script, "sh", path, str(len(content))], limit_s=limit_s, stdin=content
        )
        if done.code:
            raise DeviceError(
                f"{len(content)} bytes cannot be written to {path} on {self.label}: "
                f"{done.text.strip() or 'is its disk full?'}"
            )
        return path

    def get(self, path: str) -> bytes:
        """See `Host.get`."""
        done = self.run(["cat", "--", path], limit_s=5 * CONNECT_LIMIT_S)
        if done.code:
            raise DeviceError(f"{path} cannot be read on {self.label}: {done.text.strip()}")
        return done.stdout

    def remove(self, path: str) -> None:
        """See `Host.remove`."""
        self.run(["rm", "-f", "--", path], limit_s=CONNECT_LIMIT_S)

    def python(self) -> Sequence[str]:
        """See `Host.python`."""
        return (self._address.python,)

    def close(self) -> None:
        """See `Host.close`."""
        subprocess.run(
            [*self._client(), "-O", "exit", *self._destination()],
            stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=CONNECT_LIMIT_S,
        )  # fmt: skip
        self._sockets.cleanup()

    def refusal(self, code: int, log: str) -> DeviceError | None:
        """What ssh's exit status and complaints mean; None where it was not ssh that failed."""
        if code != CONNECTION_FAILED:
            return None
        last = log.strip().splitlines()[-1:] or ["no message"]
        said = f"{self.label}: {last[0].strip().rstrip('.')}."
        if "Host key verification failed" in log or "IDENTIFICATION HAS CHANGED" in log:
            return HostKeyError(
                f"The host key of {said} If the device is new or was set up afresh, check its "
                f"key and accept it once in a terminal: ssh {self.label}"
            )
        if "Permission denied" in log or "authentication failures" in log:
            return AuthenticationError(
                f"{said} Nothing is asked for, so a key must let you in: ssh-copy-id {self.label}"
            )
        if any(text in log for text in _NO_ANSWER):
            return UnreachableError(
                f"{said} Is the device on? `ssh {self.label}` must work in a terminal."
            )
        return DeviceLostError(f"The connection was lost. {said}")

    def _client(self) -> list[str]:
        config = ("-F", str(self._address.ssh_config)) if self._address.ssh_config else ()
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "ConnectTimeout": f"{CONNECT_LIMIT_S:.0f}",
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
            "ControlPath": f"{self._sockets.name}/%C",
        }
        return ["ssh", *config, *(part for k, v in options.items() for part in ("-o", f"{k}={v}"))]

    def _destination(self) -> list[str]:
        address = self._address
        port = ["-p", str(address.port)] if address.port else []
        user = ["-l", address.user] if address.user else []
        return [*port, *user, "--", address.host]

    def _ssh(self, command: Sequence[str], options: Sequence[str] = ()) -> list[str]:
        return [*self._client(), *options, "-T", *self._destination(), shlex.join(command)]


_NO_ANSWER = (
    "Could not resolve", "Connection refused", "timed out", "No route to host",
    "Network is unreachable", "Name or service not known",
)  # fmt: skip
