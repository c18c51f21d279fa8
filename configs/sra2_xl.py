"""SRA 2 on SiT-XL/2, ImageNet 256 px (arXiv 2601.17830).

Command: python main.py --config=configs/sra2_xl.py --config.data.dir=LATENTS
Published (paper), FID-50K, 250-step SDE: 8.2 after 1M and 6.6 after 4M steps without
guidance (SiT-XL/2: 8.3 after 7M); with guidance 1.98 at 200 and 1.52 at 800 epochs.
Not yet reproduced with this code.
"""

from ml_collections import ConfigDict

from sra2_jax.config_file import default


def get_config() -> ConfigDict:
    return default()
