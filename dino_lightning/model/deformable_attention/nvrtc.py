"""CUDA C++ compiled by NVRTC, which comes with PyTorch, and launched through the driver: no nvcc, no compiler of C.

The machine code is kept on the disk beside that of Triton, so that a process finds what another one has compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dino_lightning.files import atomic_write

MAGIC = b"\x7fELF"  # with which machine code begins


def compiled(source: str, macros: Mapping[str, int], capability: int, folder: Path | None = None) -> bytes:
    """Machine code for a device that need not be here, from the disk if it has been compiled before.

    Args:
        source: CUDA C++ without includes.
        macros: defined before it.
        capability: 86 for sm_86.
        folder: of the kept code; by default `cache_folder()`. One that cannot be used costs a compilation, no more.

    Returns:
        A cubin.

    Raises:
        RuntimeError: the source does not compile.
        OSError: there is no NVRTC.
    """
    options = [f"--gpu-architecture=sm_{capability}", "--std=c++17", *(f"-D{name}={macros[name]}" for name in macros)]
    key = hashlib.sha256("\0".join([source, *options, *map(str, _version())]).encode()).hexdigest()
    path = (folder or cache_folder()) / f"{key}.cubin"
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        if kept.startswith(MAGIC):
            return kept
    code = _compile(source, options)
    with contextlib.suppress(OSError), atomic_write(path) as temporary:
        temporary.write_bytes(code)
    return code


def cache_folder() -> Path:
    """Where compiled code is kept: in Triton's cache, which TRITON_CACHE_DIR places."""
    given = os.environ.get("TRITON_CACHE_DIR")
    return (Path(given) if given else Path("~/.triton/cache").expanduser()) / "nvrtc"


def _compile(source: str, options: Sequence[str]) -> bytes:
    nvrtc = library()
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given) != 0:
            said = _bytes_of(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            raise RuntimeError(f"NVRTC does not compile the kernel: {said.rstrip(bytes(1)).decode(errors='replace')}")
        return _bytes_of(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes_of(program: ctypes.c_void_p, size_of: ctypes._NamedFuncPointer, copy: ctypes._NamedFuncPointer) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(copy(program, buffer))
    return buffer.raw


def _check(result: int) -> None:
    if result != 0:
        raise RuntimeError(f"NVRTC failed with its error {result}")


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC as PyTorch has brought it along, or as the system has it.

    Raises:
        OSError: there is none.
    """
    if torch.version.cuda is None:
        raise OSError("this PyTorch is built without CUDA, so there is no NVRTC")
    major = torch.version.cuda.partition(".")[0]
    name = f"libnvrtc.so.{major}"
    site = Path(torch.__file__).parents[1]
    folders = [*site.glob("nvidia/*/lib"), Path(torch.__file__).parent / "lib"]
    for folder in folders:
        if (folder / name).exists():
            for builtins in sorted(folder.glob(f"libnvrtc-builtins.so.{major}*")):
                ctypes.CDLL(str(builtins))  # which NVRTC looks for by its name alone
            return ctypes.CDLL(str(folder / name))
    return ctypes.CDLL(name)


def _version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


class Kernel:
    """A kernel in the memory of one device.

    Args:
        code: what `compiled` returned.
        name: of an `extern "C"` kernel in it.
        device_index: the CUDA device, on which this process has a tensor already.

    Raises:
        RuntimeError: the driver refuses it; says why.
    """

    def __init__(self, code: bytes, name: str, device_index: int) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device_index):
            self._ask("cuModuleLoadData", ctypes.byref(self._module), code)
            self._ask("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())

    def launch(self, grid: tuple[int, int], threads: int, arguments: Sequence[torch.Tensor | int]) -> None:
        """Start it on the current stream of the current device.

        Args:
            grid: blocks along x and y.
            threads: of a block.
            arguments: tensors are passed as pointers, numbers as 32-bit integers.

        Raises:
            RuntimeError: the driver refuses it; says why.
        """
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._ask("cuLaunchKernel", self._function, *grid, 1, threads, 1, 1, 0, stream, addresses(arguments), None)

    def _ask(self, call: str, *arguments: object) -> None:
        result = getattr(self._driver, call)(*arguments)
        if result != 0:
            said = ctypes.c_char_p()
            self._driver.cuGetErrorString(result, ctypes.byref(said))
            raise RuntimeError(f"{call}: {(said.value or b'unknown error').decode()}")


def addresses(arguments: Sequence[torch.Tensor | int]) -> ctypes.Array[ctypes.c_void_p]:
    """Pointers to the arguments of a kernel, which the array keeps alive: 64-bit addresses and 32-bit integers."""
    values = [ctypes.c_int(one) if isinstance(one, int) else ctypes.c_void_p(one.data_ptr()) for one in arguments]
    array = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    array._kept = values  # type: ignore[attr-defined]  # as any Python object may have
    return array
