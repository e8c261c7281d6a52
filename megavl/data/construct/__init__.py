"""Constructions of the papers: image-text pairs made of files that are none yet (DeepSeek-VL, section 2.1)."""
