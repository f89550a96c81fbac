"""Plots of what training changed, and the numbers behind them. Only the functions that draw import matplotlib."""

from keras_lora.plots.curves import read_curves
from keras_lora.plots.drawing import plot_changes, plot_curves, plot_overlaps, plot_ranks
from keras_lora.plots.log_adapters import LogAdapters
from keras_lora.plots.measuring import AdapterMeasure, measure_adapters
from keras_lora.plots.overlaps import Overlaps, measure_overlaps

__all__ = [
    "AdapterMeasure",
    "LogAdapters",
    "Overlaps",
    "measure_adapters",
    "measure_overlaps",
    "plot_changes",
    "plot_curves",
    "plot_overlaps",
    "plot_ranks",
    "read_curves",
]
