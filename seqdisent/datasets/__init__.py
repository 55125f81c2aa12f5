"""Data sets of sequences and of clips with known factors, and your own files (extra: data)."""

from seqdisent.datasets.batch import Batch
from seqdisent.datasets.clips import Clips
from seqdisent.datasets.files import load_clips, load_frames
from seqdisent.datasets.moving_mnist import MovingMNISTRenderer, moving_mnist
from seqdisent.datasets.mug import mug
from seqdisent.datasets.pendulum import PendulumRenderer, pendulum, render_pendulum
from seqdisent.datasets.polyphonic import jsb_chorales, polyphonic_music
from seqdisent.datasets.renderer import Renderer
from seqdisent.datasets.scaler import Scaler
from seqdisent.datasets.sequence_files import load_sequences
from seqdisent.datasets.sequences import Sequences
from seqdisent.datasets.sprites import SpriteRenderer, sprites
from seqdisent.datasets.tables import sequences_from_table

__all__ = [
    "Batch",
    "Clips",
    "MovingMNISTRenderer",
    "PendulumRenderer",
    "Renderer",
    "Scaler",
    "Sequences",
    "SpriteRenderer",
    "jsb_chorales",
    "load_clips",
    "load_frames",
    "load_sequences",
    "moving_mnist",
    "mug",
    "pendulum",
    "polyphonic_music",
    "render_pendulum",
    "sequences_from_table",
    "sprites",
]
