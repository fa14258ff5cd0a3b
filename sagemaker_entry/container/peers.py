"""Heartbeats between the hosts of a job, so that none waits for a host that has failed.

A collective operation may wait half an hour for a dead host, and its timeout does not say why the host died. So each
host's launcher writes a heartbeat to a key-value store on the first host (`torch.distributed.TCPStore`), and when it
fails, its failure.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from sagemaker_entry.container.failure import Failure
from sagemaker_entry.protocol.problem import Problem

PORT = 7778  # beside 7777, which Amazon's own start scripts use
BEAT = 1.0  # seconds between heartbeats
PATIENCE = 20.0  # seconds without a heartbeat after which a host counts as failed
STRAGGLER_PATIENCE = 120.0  # seconds that training may continue here after it has ended on another host
GRACE = 10.0  # seconds for the others to read the result of this host
START_PATIENCE = 900.0  # seconds for all hosts to start: image and data downloads take different times


class Peers:
    """Watches the other hosts, in a thread of its own because calls to the store may block.

    Args:
        hosts: the names of all hosts; the store runs on the first one.
        rank: the index of this host.
        port: the store's port.
        patience: seconds without a heartbeat after which a host counts as failed.
        start_patience: seconds to wait for the first host at the start, and for the others' first heartbeat.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        rank: int,
        *,
        port: int = PORT,
        patience: float = PATIENCE,
        start_patience: float = START_PATIENCE,
    ) -> None:
        self._hosts, self._rank, self._port = tuple(hosts), rank, port
        self._patience, self._start_patience = patience, start_patience
        self._ending = threading.Event()
        self._connected = threading.Event()
        self._own: Failure | None = None
        self._found: Failure | None = None
        self._others_ended: dict[int, float] = {}
        self._last_contact = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        """Start to send heartbeats and to check those of the others."""
        if len(self._hosts) > 1:
            self._thread.start()

    def remote_failure(self) -> Failure | None:
        """The failure of another host, or None while all are well."""
        if self._found is not None or not self._thread.is_alive():
            return self._found
        now = time.monotonic()
        limit = self._patience if self._connected.is_set() else self._start_patience + self._patience
        if now - self._last_contact > limit:  # the thread itself is blocked: the first host does not answer
            return self._gone(0, now - self._last_contact)
        for rank, since in list(self._others_ended.items()):
            if now - since > STRAGGLER_PATIENCE:
                message = f"Host {self._hosts[rank]} has finished, but training still runs on this one."
                return Failure(message, host=self._hosts[self._rank])
        return self._found

    def wait_for_remote_failure(self) -> Failure | None:
        """The failure of another host, waiting as long as it can take to notice one; None if there is none."""
        deadline = time.monotonic() + self._patience + 5 * BEAT
        while self._thread.is_alive() and time.monotonic() < deadline:
            if (failure := self.remote_failure()) is not None:
                return failure
            time.sleep(0.2)
        return self.remote_failure()

    def leave(self, failure: Failure | None) -> None:
        """Send the others the result of this host; the first host waits until they have read it, for a few seconds."""
        self._own = failure
        self._ending.set()
        while failure is not None and self._thread.is_alive() and not self._connected.is_set():
            time.sleep(BEAT / 4)  # the first host may start later, and would wait for this one
        if self._thread.is_alive():
            self._thread.join(GRACE + 5 * BEAT)

    def _gone(self, rank: int, silence: float) -> Failure:
        return Failure(
            f"Host {self._hosts[rank]} has sent no heartbeat for {silence:.0f} seconds: it was shut down, ran out "
            "of memory, or cannot be reached.",
            host=self._hosts[self._rank],
        )

    def _watch(self) -> None:
        try:
            store = self._connect()
        except Exception as error:  # the store raises errors of many types
            self._found = Failure(
                f"Host {self._hosts[self._rank]} cannot reach {self._hosts[0]} at port {self._port} ({error}); in a "
                "VPC, the security group must allow traffic between its own members.",
                host=self._hosts[self._rank],
                secondary=True,
            )
            return
        self._last_contact = time.monotonic()
        self._connected.set()
        beats = 0
        seen = {rank: (b"", time.monotonic() + self._start_patience) for rank in range(len(self._hosts))}
        ended = self._others_ended
        deadline: float | None = None
        while True:
            try:
                beats += 1
                store.set(f"beat/{self._rank}", str(beats))
                if self._ending.is_set() and deadline is None:
                    deadline = time.monotonic() + GRACE
                    store.set(f"end/{self._rank}", self._own.to_json() if self._own else "null")
                for rank in range(len(self._hosts)):
                    if rank != self._rank and rank not in ended:
                        self._check_host(store, rank, seen)
                self._last_contact = time.monotonic()
            except Exception as error:  # the connection to the first host is lost
                if not self._ending.is_set() and 0 not in ended and self._found is None:
                    self._found = Failure(
                        f"Host {self._hosts[0]} closed the connection ({type(error).__name__}): it failed or was "
                        "shut down.",
                        host=self._hosts[self._rank],
                    )
                return
            all_have_read = self._rank != 0 or len(ended) == len(self._hosts) - 1
            if deadline is not None and (all_have_read or time.monotonic() > deadline):
                return
            self._ending.wait(BEAT) if deadline is None else time.sleep(BEAT / 4)

    def _check_host(self, store: TCPStore, rank: int, seen: dict[int, tuple[bytes, float]]) -> None:
        now = time.monotonic()
        if store.check([f"end/{rank}"]):
            self._others_ended[rank] = now
            failure = json.loads(store.get(f"end/{rank}"))
            if failure is not None and self._found is None:
                self._found = Failure(**failure)
            return
        if store.check([f"beat/{rank}"]):
            beat, since = seen[rank]
            newest = store.get(f"beat/{rank}")
            seen[rank] = (newest, now if newest != beat else min(since, now))
        since = seen[rank][1]
        if now - since > self._patience and self._found is None:
            self._found = self._gone(rank, now - since)

    def _connect(self) -> TCPStore:
        deadline = time.monotonic() + self._start_patience
        while self._rank != 0:
            try:
                socket.create_connection((self._hosts[0], self._port), timeout=5).close()
                break
            except OSError as error:  # not started yet, or its name not yet in DNS
                if time.monotonic() > deadline:
                    raise Problem(str(error)) from error
                time.sleep(BEAT)
        return TCPStore(
            self._hosts[0],
            self._port,
            world_size=None,
            is_master=self._rank == 0,
            timeout=timedelta(seconds=self._patience),
            wait_for_workers=False,
        )
