"""Plots of sequences and of training (extra ``plot``): grids, GIFs, heat maps, intervals, schedules, ledgers."""

from seqdisent.plotting.heatmaps import plot_heatmap
from seqdisent.plotting.pictures import film_strip, save_gif, save_png, swap_table
from seqdisent.plotting.series import plot_error_over_time, plot_intervals
from seqdisent.plotting.training import plot_ledger, plot_schedules

__all__ = [
    "film_strip",
    "plot_error_over_time",
    "plot_heatmap",
    "plot_intervals",
    "plot_ledger",
    "plot_schedules",
    "save_gif",
    "save_png",
    "swap_table",
]
