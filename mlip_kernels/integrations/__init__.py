"""Other people's training loops with losses of this package: `open_clip`, `transformers`."""
