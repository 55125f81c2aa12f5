"""Data sets of clips with known factors, and your own files (extra: data)."""

from seqdisent.datasets.clips import Batch, Clips, Renderer
from seqdisent.datasets.files import load_clips, load_frames
from seqdisent.datasets.moving_mnist import MovingMNISTRenderer, moving_mnist
from seqdisent.datasets.pendulum import PendulumRenderer, pendulum, render_pendulum
from seqdisent.datasets.sprites import SpriteRenderer, sprites

__all__ = [
    "Batch",
    "Clips",
    "MovingMNISTRenderer",
    "PendulumRenderer",
    "Renderer",
    "SpriteRenderer",
    "load_clips",
    "load_frames",
    "moving_mnist",
    "pendulum",
    "render_pendulum",
    "sprites",
]
