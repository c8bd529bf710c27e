"""Draw disagreement_bound.png beside this file: `python docs/figures/disagreement_bound.py`.

A student and a teacher that are jointly Gaussian, of variance 1 and correlation rho, and the label
"above 0": how often their decisions differ, and the bound made of the differential entropy.
"""

from math import log, pi
from pathlib import Path

import matplotlib
import torch

from mtkd.information import disagreement_bound

matplotlib.use("Agg")
from matplotlib import pyplot

rho = torch.linspace(0, 0.999, 10_000, dtype=torch.float64)
entropy = 0.5 * (log(2 * pi) + 1 + torch.log1p(-rho.square()))
bound = torch.stack([disagreement_bound(h) for h in entropy])
truth = torch.acos(rho) / pi
crossing = rho[truth > bound][0].item()

style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
with pyplot.rc_context(style):
    figure, panels = pyplot.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
    for panel, start in zip(panels, (0.0, 0.94), strict=True):
        panel.plot(rho, bound, color="#2a7fb8", label=r"bound $1 - e^{-h(T|S)}$")
        panel.plot(rho, truth, color="#d1335b", label=r"truth $\arccos(\rho) / \pi$")
        panel.fill_between(rho, bound, truth, where=truth > bound, color="#d1335b", alpha=0.15)
        panel.axvline(crossing, color="#777777", linewidth=0.8, linestyle="--")
        panel.set_xlim(start, 1)
        panel.set_xlabel(r"correlation $\rho$ of student and teacher")
    panels[0].set_ylim(-0.3, 0.8)
    panels[0].set_ylabel("disagreement")
    panels[0].legend(frameon=False)
    panels[1].set_ylim(-0.15, 0.25)
    panels[1].set_title(rf"broken from $\rho$ = {crossing:.3f} on", fontsize=9)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
