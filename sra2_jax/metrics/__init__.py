"""Metrics of sets of images: their names, in the order of papers; without jax."""

# metric -> title, direction
METRICS = {
    "fid": ("FID", "lower is better"),
    "fd_dinov2": ("FD-DINOv2", "lower is better"),
    "frechet": ("Fréchet distance, proxy", "lower is better"),
    "sfid": ("sFID", "lower is better"),
    "kernel_distance": ("Kernel distance", "lower is better"),
    "inception_score": ("Inception Score", "higher is better"),
    "accuracy": ("Recognised as asked", "higher is better"),
    "precision": ("Precision", "higher is better"),
    "recall": ("Recall", "higher is better"),
}
