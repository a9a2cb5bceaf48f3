"""Prompts and seeds in, images out: noise, text, the loop of one call per step, the pipeline."""
