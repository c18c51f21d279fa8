"""The alignments, by their section of config.align; a new one is a file and a line."""

from sra2_jax.alignment.base import Alignment as Alignment
from sra2_jax.alignment.encoder import EncoderAlignment
from sra2_jax.alignment.irepa import SpatialAlignment
from sra2_jax.alignment.teacher import TeacherAlignment
from sra2_jax.alignment.vae import LatentAlignment

ALIGNMENTS: dict[str, type[Alignment]] = {
    "vae": LatentAlignment,
    "encoder": EncoderAlignment,
    "irepa": SpatialAlignment,
    "teacher": TeacherAlignment,
}
# of their heads in checkpoints of PyTorch code, see `weights.sit`
HEAD_NAMES = {n: (a.reference, a.reference_linear) for n, a in ALIGNMENTS.items()}
