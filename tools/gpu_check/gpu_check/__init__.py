"""What a GPU says of the package: correctness, capture, times and models, in one run. See the README beside."""
