"""Engines: what runs the shards of a build. The output does not depend on it."""
