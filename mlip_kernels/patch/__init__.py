"""Where patches for models of timm, open_clip and transformers will live; none is written yet."""
