"""Records as pictures: one self-contained HTML page per run. Needs no torch."""

from encoderguard.report.page import render, write_report
from encoderguard.report.summary import summary_figure

__all__ = ["render", "summary_figure", "write_report"]
