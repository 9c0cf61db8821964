"""Kernel names as people write them: ``weighted_mean_sums_forward_kernel<bf16, 8>`` for what C++ mangles."""

from __future__ import annotations

import ctypes
import functools
import re

ELEMENTS = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "double": "fp64"}


@functools.cache
def _cxa_demangle():
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]
    function.restype = ctypes.c_void_p
    return function, free


@functools.cache
def demangled(name: str) -> str:
    """``name`` as C++ source has it; itself if it was never mangled."""
    if not name.startswith("_Z"):
        return name
    demangle, free = _cxa_demangle()
    status = ctypes.c_int()
    address = demangle(name.encode(), None, None, ctypes.byref(status))
    if not address:
        return name
    try:
        return ctypes.string_at(address).decode()
    finally:
        free(address)


@functools.cache
def readable(name: str) -> str:
    """The kernel's own name and its template arguments, without namespaces, parameters or result."""
    text = re.sub(r"\(anonymous namespace\)|_GLOBAL__N__\w+", "", demangled(name))
    match = re.search(r"(?:^|[\s:])([A-Za-z_]\w*)(<[^(]*>)?(?:\(|$)", text)
    if match is None:
        return name
    kernel, template = match.group(1), match.group(2) or ""
    return kernel + re.sub(r"\b\w+\b", lambda word: ELEMENTS.get(word.group(), word.group()), template)


def kernel_of(name: str) -> str:
    """``readable(name)`` without the template arguments: the name in the source."""
    return readable(name).partition("<")[0]


def instance_of(name: str) -> str:
    """The template arguments alone, such as ``<bf16, 8>``; empty where there are none."""
    return readable(name).removeprefix(kernel_of(name))
