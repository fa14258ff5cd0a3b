"""A trained model over HTTP, as SageMaker asks it of a container: for endpoints, batch transform, and this machine.

    python -m sagemaker_entry.serve [--model /opt/ml/model] [--port 8080]

GET /ping answers 200 once the model is loaded; POST /invocations takes and gives what `inference` says; batch transform
asks GET /execution-parameters. One thread computes, one request after another, so that /ping answers meanwhile.
"""

from __future__ import annotations

from dino_lightning.interrupts import ended, handle_ctrl_c

if __name__ == "__main__":
    handle_ctrl_c()  # before the imports that take time

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_lightning.cli.command import CommandParser, run_command
from sagemaker_entry.container.install import install
from sagemaker_entry.protocol.problem import Problem

if TYPE_CHECKING:  # the packages may have to be installed first
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MODEL_DIR = "/opt/ml/model"
PORT_VARIABLE = "SAGEMAKER_BIND_TO_PORT"
BATCH_VARIABLE = "SAGEMAKER_BATCH"  # "true" in the container of a batch transform
DEFAULT_PORT = 8080
SECONDS_TO_SEND = 60.0  # for the bytes of a request; SageMaker gives up on an answer after as many
SECONDS_TO_FINISH = 25  # for the running requests after SIGTERM; SageMaker sends SIGKILL after 30
DISCARDED = 4  # times the limit: what is read of a request that is too large, so that its sender reads the answer
TIMED_OUT, INTERNAL_ERROR, BUSY = 408, 500, 503
log = logging.getLogger("serve")


class Server:
    """The answers of a server, and the one thread that computes them.

    Args:
        load: loads the model.
        batch: answer a request that cannot be answered with status 200 and its sentence: batch transform ends a job
            at any other, with the answers to all its good images.
    """

    def __init__(self, load: Callable[[], Any], *, batch: bool = False) -> None:
        self._load = load
        self._batch = batch
        self._model: Any = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._waiting = 0
        self.failure: str | None = None
        self.stop: Callable[[], None] = lambda: None  # called where the model cannot be loaded

    def app(self) -> Starlette:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            loading = asyncio.get_running_loop().run_in_executor(self._worker, self._load_model)
            yield
            self._worker.shutdown(wait=False, cancel_futures=True)
            loading.cancel()

        async def http_error(_: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            return _error(error.status_code, f"{error.detail}; POST /invocations is what detects.", error.headers)

        return Starlette(
            routes=[
                Route("/ping", self._ping, methods=["GET"]),
                Route("/invocations", self._invocations, methods=["POST"]),
                Route("/execution-parameters", self._execution_parameters, methods=["GET"]),
            ],
            exception_handlers={HTTPException: http_error},
            lifespan=lifespan,
        )

    def _load_model(self) -> None:
        started = time.monotonic()
        try:
            self._model = self._load()
        except Exception as error:
            if not isinstance(error, ValueError):  # ours are, and say what to do
                traceback.print_exception(error)
            self.failure = f"The model cannot be loaded: {error}"
            self.stop()
            return
        log.info("ready after %.1f s: %s", time.monotonic() - started, self._model)

    async def _ping(self, _: Request) -> Response:
        from starlette.responses import Response

        return Response(status_code=BUSY if self._model is None else 200)

    async def _execution_parameters(self, _: Request) -> Response:
        """What batch transform may send: one image at a time, of which at most two at once."""
        from starlette.responses import JSONResponse

        from sagemaker_entry.inference import limits

        megabytes = max(1, limits().max_bytes // 2**20)
        return JSONResponse(
            {"MaxConcurrentTransforms": 2, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": megabytes}
        )

    async def _invocations(self, request: Request) -> Response:
        from sagemaker_entry.inference import limits

        if self._model is None:
            return _error(BUSY, "The model is not loaded yet.")
        if self._waiting >= limits().max_waiting:
            return _error(BUSY, f"{self._waiting} requests are waiting already; try again later.", {"Retry-After": "1"})
        started = time.monotonic()
        self._waiting += 1
        try:
            status, answer = await self._answered(request)
        except Exception:
            log.exception("internal error")
            return _error(INTERNAL_ERROR, "Internal error; the log of the container says more.")
        finally:
            self._waiting -= 1
        log.info("%d in %.3f s", status, time.monotonic() - started)
        if self._batch and 400 <= status < 500:
            status = 200
        return _response(status, answer)

    async def _answered(self, request: Request) -> tuple[int, str]:
        from sagemaker_entry.inference import RequestError, check_type, encoded

        kind, accept = request.headers.get("content-type"), request.headers.get("accept")
        try:
            check_type(kind)
            body = await asyncio.wait_for(_body(request), SECONDS_TO_SEND)
        except RequestError as error:
            return encoded(error, accept)
        except asyncio.TimeoutError:
            return encoded(RequestError("The request did not arrive in time.", TIMED_OUT), accept)
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._detect, body, kind or "", accept)

    def _detect(self, body: bytes, kind: str, accept: str | None) -> tuple[int, str]:
        """In the thread of the model: decode, detect, encode."""
        from sagemaker_entry.inference import encoded, input_fn, predict_fn

        return encoded(predict_fn(input_fn(body, kind), self._model), accept)


async def _body(request: Request) -> bytes:
    """The bytes of a request; no more of them than the limit are kept.

    Raises:
        RequestError: there are more.
    """
    from starlette.requests import ClientDisconnect

    from sagemaker_entry.inference import RequestError, check_size, limits

    parts: list[bytes] = []
    count = 0
    try:
        async for part in request.stream():
            count += len(part)
            if count <= limits().max_bytes:
                parts.append(part)
            else:
                parts.clear()
                if count > DISCARDED * limits().max_bytes:
                    break
    except ClientDisconnect as error:
        raise RequestError("The request broke off.") from error
    check_size(count)
    return b"".join(parts)


def _response(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    from starlette.responses import Response

    return Response(text, status_code=status, media_type="application/json", headers=dict(headers or {}))


def _error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    return _response(status, json.dumps({"error": sentence}), headers)


def serve(model_dir: Path, host: str, port: int, environ: Mapping[str, str] = os.environ) -> int:
    """Serve a model until SIGTERM or Ctrl-C; returns the exit code.

    Args:
        model_dir: as a job leaves it.
        host: the address to listen at.
        port: the port, 0 for a free one.
        environ: environment variables.

    Raises:
        Problem: a package of the server is missing, or there is no model.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise Problem("Serving needs its packages: python -m pip install 'dino-lightning[serve]'.") from error
    from sagemaker_entry.inference import model_fn

    if not (model_dir / "model.ckpt").is_file():
        raise Problem(f"{model_dir} holds no model.ckpt; give a folder as a job leaves it, or as `fetch` makes it.")
    logging.basicConfig(level=logging.INFO, format="[serve] %(message)s", stream=sys.stdout)
    served = Server(lambda: model_fn(str(model_dir)), batch=environ.get(BATCH_VARIABLE, "").lower() == "true")
    config = uvicorn.Config(
        served.app(),
        host=host,
        port=port,
        access_log=False,  # SageMaker asks /ping every few seconds
        log_config=None,
        timeout_graceful_shutdown=SECONDS_TO_FINISH,
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    served.stop = stop
    for number in (signal.SIGTERM, signal.SIGINT):  # from uvicorn's end on
        signal.signal(number, lambda *_: None)
    # uvicorn's own handler drops at a second Ctrl-C what it is answering, with a traceback
    server.handle_exit = lambda sig, frame: stop()  # type: ignore[method-assign]  # it has no option
    server.run()
    if served.failure is not None:
        raise Problem(served.failure)
    return 0 if server.started else 1


def main(args: Sequence[str]) -> int:
    """Serve the model of a folder; returns the exit code."""

    def action() -> int:
        parser = CommandParser("python -m sagemaker_entry.serve", "Serve a trained model over HTTP.")
        parser.add_argument("word", nargs="?", choices=["serve"], help="what SageMaker gives its containers")
        parser.add_argument("--model", default=MODEL_DIR, help="the model's folder; default %(default)s")
        parser.add_argument("--host", default="0.0.0.0", help="the address to listen at; default %(default)s")
        parser.add_argument(
            "--port",
            type=int,
            default=_port(os.environ),
            help=f"default {DEFAULT_PORT}, or {PORT_VARIABLE}; 0: a free one",
        )
        parser.add_argument(
            "--install", action="store_true", help="first install the requirements that lie beside the code"
        )
        options = parser.parse_args(args)
        if options.install:
            install(Path(__file__).parent.parent, _run)
        return serve(Path(options.model), options.host, options.port)

    return run_command(action)


def _port(environ: Mapping[str, str]) -> int:
    text = environ.get(PORT_VARIABLE, str(DEFAULT_PORT))
    if not text.isdigit() or not 0 <= int(text) < 65536:
        raise Problem(f"{PORT_VARIABLE} is {text!r}; it must be the number of a port.")
    return int(text)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


if __name__ == "__main__":
    sys.exit(ended(main(sys.argv[1:])))
