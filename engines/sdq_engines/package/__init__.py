"""The shippable folder: its layout, its manifest, and the checks before anything in it is parsed."""
