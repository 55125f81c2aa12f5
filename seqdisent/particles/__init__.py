"""Particles: a filter for any model and guide whose latents are chains, a smoother, and schemes of resampling."""

from seqdisent.particles.filtering import Particles, filter
from seqdisent.particles.resampling import resample
from seqdisent.particles.smoothing import smooth

__all__ = ["Particles", "filter", "resample", "smooth"]
