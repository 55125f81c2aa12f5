"""Measures of what a trained model does, usable with anyone's model."""

from seqdisent.metrics.counterfactual import nearest_clip, pick_donors, squared_error

__all__ = ["nearest_clip", "pick_donors", "squared_error"]
