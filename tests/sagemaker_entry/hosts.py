"""SageMaker's hosts without SageMaker: network namespaces with an /opt/ml of their own, filled as the service fills it.

A host is a process tree in its own network, mount, host-name and process namespaces: its first command is process 1, it
knows the others as algo-1, algo-2, and killing process 1 ends everything in it, as the end of a container does. All are
called "aws", a name that does not resolve, as SageMaker's containers are by the words of AWS's changehostname.c. Needs
root and iproute2.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

SUBNET = "10.213.7"


def usable() -> bool:
    """Whether this machine lets us make such hosts."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        return False
    name = f"dino-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=False)
    return made and not sys.base_prefix.startswith("/opt") and not sys.prefix.startswith("/opt")


class Host:
    """One host; `root` outside is /opt/ml inside."""

    def __init__(self, network: Network, index: int, root: Path) -> None:
        self.name, self.root = f"algo-{index + 1}", root
        self.namespace = f"{network.name}-{index + 1}"
        self.process: subprocess.Popen[str] | None = None
        self.log = root.parent / f"{root.name}.log"

    def start(self, command: list[str], **variables: str) -> None:
        """Start a command as process 1 of this host."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {"PATH": path, "HOME": str(self.root), "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8", **variables}
        inside = (
            f"mount -t tmpfs tmpfs /opt && mkdir /opt/ml && mount --bind {shlex.quote(str(self.root))} /opt/ml && "
            f"hostname aws && cd /opt/ml && exec {shlex.join(command)}"
        )
        full = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc"]
        command = [*full, "--kill-child", "sh", "-c", inside]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def signal(self, number: int) -> None:
        """Send a signal to process 1, as the container runtime does."""
        (first,) = psutil.Process(self.process.pid).children()
        first.send_signal(number)

    def wait(self, timeout: float) -> int:
        """The exit code of process 1."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {timeout} s:\n{self.text()[-3000:]}") from None

    def unplug(self) -> None:
        """Take the host off the network, without a word to the others."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, words: str, timeout: float = 120) -> None:
        """Wait until it prints something."""
        deadline = time.monotonic() + timeout
        while words not in self.text():
            assert self.process.poll() is None, f"{self.name} ended:\n{self.text()[-3000:]}"
            assert time.monotonic() < deadline, f"{self.name} never said {words!r}:\n{self.text()[-3000:]}"
            time.sleep(0.05)


class Network:
    """Hosts on one bridge; a context manager that takes everything away again."""

    def __init__(self, folder: Path, count: int) -> None:
        self.name = f"dino{os.getpid() % 10000}{time.monotonic_ns() % 1000}"
        self.hosts = [Host(self, index, folder / f"algo-{index + 1}") for index in range(count)]

    def __enter__(self) -> Network:
        _ip("netns", "add", self.name)
        _ip("-n", self.name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.name, "link", "set", "bridge", "up")
        addresses = {host.name: f"{SUBNET}.{index + 1}" for index, host in enumerate(self.hosts)}
        for host in self.hosts:
            host.root.mkdir(parents=True, exist_ok=True)
            port = f"p-{host.name}"
            _ip("netns", "add", host.namespace)
            _ip("-n", self.name, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", self.name, "link", "set", port, "master", "bridge", "up")
            _ip("-n", host.namespace, "address", "add", f"{addresses[host.name]}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            folder = Path("/etc/netns") / host.namespace
            folder.mkdir(parents=True)
            lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
            (folder / "hosts").write_text("\n".join(lines) + "\n")
        return self

    def __exit__(self, *error: object) -> None:
        for host in self.hosts:
            if host.process is not None and host.process.poll() is None:
                host.process.kill()
                host.process.wait()
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False)
            shutil.rmtree(Path("/etc/netns") / host.namespace, ignore_errors=True)
        subprocess.run(["ip", "netns", "delete", self.name], check=False)


def fill(
    host: Host, hosts: list[Host], channels: dict[str, Path], hyperparameters: dict[str, str] | None = None
) -> None:
    """Fill a host's /opt/ml as SageMaker does before it starts the container; model and output begin empty."""
    root = host.root
    for name in ("model", "output", "input"):
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("model", "output/data", "checkpoints", "input/config", "input/data"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, folder in channels.items():
        shutil.copytree(folder, root / "input" / "data" / name)
    files = {
        "resourceconfig": {
            "current_host": host.name,
            "current_instance_type": "ml.m5.large",
            "hosts": [other.name for other in hosts],
            "network_interface_name": "eth0",
        },
        "inputdataconfig": {
            name: {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated"} for name in channels
        },
        "hyperparameters": hyperparameters or {},
        "checkpointconfig": {"S3Uri": "s3://bucket/checkpoints", "LocalPath": "/opt/ml/checkpoints"},
    }
    for name, content in files.items():
        (root / "input" / "config" / f"{name}.json").write_text(json.dumps(content))


def restore_checkpoints(hosts: list[Host]) -> None:
    """What SageMaker does before a job resumes: the first host's checkpoints, from S3, on all hosts."""
    for host in hosts[1:]:
        shutil.rmtree(host.root / "checkpoints", ignore_errors=True)
        shutil.copytree(hosts[0].root / "checkpoints", host.root / "checkpoints")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
