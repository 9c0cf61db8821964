"""Token merging in other people's models: those of `timm`, `open_clip` and `transformers`; `tome` has ToMe's names."""
