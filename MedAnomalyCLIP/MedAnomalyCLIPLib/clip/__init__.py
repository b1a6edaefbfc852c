"""CLIP as the detectors use it: open_clip towers with tapped layers, tokenizers and prompts."""
