"""A streaming inference engine for autoregressive video and world models."""

__version__ = "0.2.0"
