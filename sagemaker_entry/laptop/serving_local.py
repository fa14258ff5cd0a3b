"""`deploy --local` and `transform --local`: the server of a model on this machine, without AWS."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from dino_lightning.cli.command import INTERRUPTED
from dino_lightning.data.image_files import is_image
from dino_lightning.files import atomic_write
from dino_lightning.interrupts import ctrl_c_left_to_this_process
from sagemaker_entry.protocol.problem import Problem

SECONDS_FOR_AN_ANSWER = 600


def model_folder(path: str) -> Path:
    """The folder of a model: itself, or `model` in the folder of `launch --local`.

    Raises:
        Problem: there is no model in it.
    """
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "model.ckpt").is_file():
            return folder.resolve()
    raise Problem(f"{path} holds no model.ckpt; give the folder that `fetch` made, or that of `launch --local`.")


def _command(model: Path, port: int) -> list[str]:
    options = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "sagemaker_entry.serve", *options]


def serve_locally(path: str, port: int) -> int:
    """Serve a model on this machine until Ctrl-C; returns the exit code: then 0 if the server had begun, else 130."""
    model = model_folder(path)
    address = f"http://127.0.0.1:{port or 'PORT'}/invocations"
    print(
        f"The server of an endpoint on this machine, without AWS: {model}\n\n"
        f"    curl {address} -H 'Content-Type: image/png' --data-binary @plan.png\n\n"
        f"{'' if port else 'PORT is the one that the server names. '}Ctrl-C ends it.\n",
        flush=True,
    )
    with ctrl_c_left_to_this_process():
        child = subprocess.Popen(_command(model, port))
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.terminate()
        code = child.wait()
        if code < 0:  # before it could say so itself
            raise
        return INTERRUPTED if code else 0
    finally:  # after SIGTERM, which comes to this process alone
        if child.poll() is None:
            child.terminate()
            child.wait()


def transform_locally(path: str, images: str, output: str) -> int:
    """Send the images of a folder to the server of a model; writes for each NAME.out, as batch transform does.

    Args:
        path: the model's folder.
        images: the folder of the images.
        output: the folder for the answers.

    Returns:
        The exit code: 1 where an image could not be read.

    Raises:
        Problem: no model, no images, or a server that did not start.
    """
    model, source, target = model_folder(path), Path(images), Path(output)
    files = (
        sorted(file for file in source.rglob("*") if file.is_file() and is_image(file.name)) if source.is_dir() else []
    )
    if not files:
        raise Problem(f"{images} is no folder with images.")
    environ = {**os.environ, "SAGEMAKER_BATCH": "true", "PYTHONUNBUFFERED": "1"}
    with ctrl_c_left_to_this_process():
        server = subprocess.Popen(
            _command(model, 0), env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    with server as child:
        try:
            port = _port_once_ready(child)
            broken = 0
            for file in files:
                answer = _answer(port, file.read_bytes())
                place = target / file.relative_to(source).with_name(f"{file.name}.out")
                place.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(place) as partial:
                    partial.write_bytes(answer)
                if "error" in json.loads(answer):
                    broken += 1
                    print(f"{file}: {json.loads(answer)['error']}", file=sys.stderr)
        finally:
            child.terminate()
    print(f"{len(files) - broken} of {len(files)} images answered: {target}")
    return 1 if broken else 0


def _port_once_ready(child: subprocess.Popen[str]) -> int:
    assert child.stdout is not None
    port, lines = 0, []
    for line in child.stdout:
        lines.append(line.strip())
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", line)
        port = int(found[1]) if found else port
        if port and " ready after " in line:
            return port
    raise Problem(f"The server did not start: {lines[-1] if lines else 'it said nothing'}")


def _answer(port: int, content: bytes) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS_FOR_AN_ANSWER)
    try:
        connection.request("POST", "/invocations", content, {"Content-Type": "application/x-image"})
        return connection.getresponse().read()
    finally:
        connection.close()
