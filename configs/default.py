"""The paper's SRA 2 at XL/2, 256 px: every key at its default, see sra2_jax/config.py.

For config files of your own: `from sra2_jax.config_file import default, set_size`.
"""

from sra2_jax.config_file import BLOCKS, SIZES, default, set_size

__all__ = ["BLOCKS", "SIZES", "get_config", "set_size"]
get_config = default
