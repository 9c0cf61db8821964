"""Token merging in other people's models: `timm` patches timm's vision transformers, `tome` has ToMe's names."""
