"""What must not break the package: generated input, damaged files, killed processes."""
