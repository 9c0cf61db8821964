"""Public functions: argument checks, operators and their gradients. Start here to read a family."""
