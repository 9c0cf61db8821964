"""Public functions: argument checks, operators and their gradients. Start here to read a family."""

from mlip_kernels._flops import register_when_imported

register_when_imported()
