"""A plan that is over in minutes, on the 8x8 digits: to see the study work.

Its judge may be the encoder that REPA aligns with: no evidence.
"""

from benchmarks.study.methods import SIT, SRA2

config = "configs/digits.py"
keys = {"data.dir": "{data}/latents", "data.images": ""}
methods = {"SiT": SIT, "SRA 2": SRA2}
samplings = {"SRA 2": {"head 1.4": {"sampling.head_guidance": 1.4}}}
baseline = "SiT"
stages = 200, 400
seeds = 2
samples = 200
