"""Making detectors: image sets, captions, losses and the recipe of the bundled detector."""
