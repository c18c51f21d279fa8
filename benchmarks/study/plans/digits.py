"""A plan that is over in minutes, on the quickstart's digits: to see the study work.

Its `judge` is the encoder that REPA aligns with: no evidence for or against it.
"""

config = "configs/quickstart.py"
keys = {"data.dir": "{data}/latents", "data.images": ""}
methods = {
    "SiT": {"align.vae.enabled": False},
    "SRA 2": {},
}
baseline = "SiT"
stages = 200, 400
seeds = 2
samples = 200
