"""Every configuration key, once, with its unit. Other configs state what differs.

Values are the paper's SRA 2 at XL/2, 256 px (arXiv 2601.17830) unless said otherwise.
"""

from typing import Any

from ml_collections import ConfigDict

# size -> (width, depth, heads)
SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
# size -> blocks of align.vae, align.encoder, align.teacher and of the teacher itself.
# XL and SRA 2 are published; for the others see docs/decisions.md.
BLOCKS = {
    "S": (2, 4, 4, 8),
    "B": (2, 4, 4, 8),
    "L": (8, 8, 8, 16),
    "XL": (8, 8, 8, 20),
}
EPOCH = 5004  # steps of 256 images in ImageNet


def set_size(config: ConfigDict, size: str) -> None:
    """Set the network to one of SiT's sizes, and the aligned blocks to its own."""
    config.model.width, config.model.depth, config.model.heads = SIZES[size]
    align = config.align
    align.vae.depth, align.encoder.depth, align.teacher.depth, teacher = BLOCKS[size]
    align.teacher.teacher_depth = teacher


def alignment(**different: Any) -> ConfigDict:
    """The keys that every alignment target has; the others are beside its section."""
    a = ConfigDict()
    a.enabled = False
    a.depth = 8  # aligned block, 1-based
    a.weight = 1.0  # lambda
    a.schedule = "constant"  # of the weight: constant, linear, cosine, exponential
    a.schedule_start = 0  # step at which the weight begins to fall
    a.schedule_steps = 1  # steps of the fall (exponential: tenfold)
    a.loss = "smooth_l1"  # smooth_l1, l1, l2, cosine
    a.beta = 0.05  # of smooth_l1
    a.zscore = False  # standardise both sides per sample
    a.t_min = 0.0  # times aligned, 0 = data
    a.t_max = 1.0
    a.head_layers = 3
    a.head_width = 0  # hidden channels; 0 = twice the model's width
    a.head_final_layer = False  # end in a layer like DiT's final one
    a.update(different)
    return a


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.name = "sra2_xl"
    c.seed = 0
    c.steps = 4_000_000  # optimizer steps of the whole run
    c.batch_size = 256  # images a step, over all devices and hosts

    c.data = ConfigDict()
    c.data.dir = ""  # latents dataset; "" = WORKDIR/latents
    c.data.images = ""  # encode these first if data.dir is missing: a folder with one
    # sub-folder a class, "tfds:NAME[:SPLIT]" or "digits"; "" = never
    c.data.resolution = 256  # side of the images, pixels
    c.data.num_classes = 1000
    c.data.streams = 8  # independent readers a batch is put together from
    c.data.shuffle_buffer = 16384  # records, over all streams

    c.vae = "stabilityai/sd-vae-ft-ema"  # diffusers folder, hub id, or "digits"

    c.latents = ConfigDict()
    c.latents.size = 32  # side of the latent grid
    c.latents.channels = 4
    c.latents.scaling_factor = 0.18215  # latent = scaling * (raw - shift)
    c.latents.shift_factor = 0.0

    c.model = ConfigDict()
    c.model.width, c.model.depth, c.model.heads = SIZES["XL"]
    c.model.patch_size = 2
    c.model.mlp_ratio = 4.0
    c.model.time_scale = 1.0  # factor on t in [0, 1] before its features
    c.model.learn_sigma = False  # a second half of the output that nothing uses
    c.model.scan = True  # blocks as a loop, or unrolled
    c.model.remat = "dots"  # rematerialisation: none, dots, attention, full
    c.model.attention = "auto"  # xla, cudnn, auto: cudnn on GPUs where it works
    c.model.dtype = "bfloat16"  # compute type: bfloat16, float32

    c.label_dropout = 0.1  # share of labels replaced by the null label

    c.transport = ConfigDict()
    c.transport.path = "linear"  # linear, gvp, vp
    c.transport.prediction = "velocity"  # velocity, noise, data
    c.transport.time = "uniform"  # uniform, lognormal
    c.transport.time_mean = 0.0  # of log(sigma / alpha), lognormal only
    c.transport.time_std = 1.0

    c.align = ConfigDict()
    c.align.vae = alignment(enabled=True, head_layers=5)  # SRA 2: the clean latent
    c.align.vae.target = "sample"  # sample (the latent x_t is built from), mean
    # REPA: patch features of an encoder of the clean image
    c.align.encoder = alignment(weight=0.5, loss="cosine", head_width=2048)
    c.align.encoder.model = "facebook/dinov2-base"  # folder, hub id, or "digits"
    c.align.encoder.width = 768  # of the encoder's tokens
    c.align.encoder.source = "images"  # images (encoder in the step), features (stored)
    # SRA: a later block of the EMA network, at a lower noise level
    c.align.teacher = alignment(weight=0.2, schedule="exponential", head_layers=2)
    c.align.teacher.schedule_start = 149 * EPOCH
    c.align.teacher.schedule_steps = 1000 * EPOCH
    c.align.teacher.teacher_depth = 20  # the teacher's block, 1-based
    c.align.teacher.interval = 0.2  # teacher's t = clamp(t - interval * U(0, 1), 0, 1)

    c.optim = ConfigDict()  # AdamW
    c.optim.learning_rate = 1e-4
    c.optim.warmup_steps = 0  # linear warm-up
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 1.0  # global gradient norm
    c.ema_decay = 0.9999  # from step 0
    c.accumulate = 1  # micro-batches a step

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices that hold copies of the state; -1 = all that are left
    c.mesh.fsdp = 1  # devices that share one copy
    c.mesh.tensor = 1  # devices that share a layer's heads and hidden channels

    c.sampling = ConfigDict()
    c.sampling.method = "euler_maruyama"  # euler, heun, euler_maruyama
    c.sampling.steps = 250
    c.sampling.guidance = 1.0  # 1 = off
    c.sampling.guidance_low = 0.0  # guided where low <= t <= high
    c.sampling.guidance_high = 1.0
    c.sampling.guidance_channels = 0  # guide the first channels only; 0 = all
    c.sampling.rounding = "truncate"  # to uint8: truncate (REPA, SRA), sit (SiT, DiT)
    c.sampling.labels = "random"  # of scored samples: random, balanced (i mod classes)
    c.sampling.batch_size = 64  # images sampled at a time, over all devices

    c.run = ConfigDict()
    c.run.log_every = 100  # steps
    c.run.checkpoint_every = 10_000
    c.run.keep_checkpoints = 3  # the newest
    c.run.keep_every = 0  # and those of every so many steps; 0 = none
    c.run.keep_best = 1  # and those with the best Fréchet distance (config.eval)
    c.run.sample_every = 50_000
    c.run.most_skipped = 10  # updates in a row, of losses or gradients not finite
    c.run.stall_seconds = 1800  # without progress until the run ends itself
    c.run.grid_classes = 8  # rows of a sample grid, spread over the classes
    c.run.grid_columns = 8

    c.eval = ConfigDict()
    c.eval.features = ""  # score samples while training. "inception": FID, sFID, IS;
    # "digits": the quickstart's proxies; "" = never
    c.eval.inception = "inception.safetensors"  # its weights, see docs/evaluation.md
    c.eval.reference = ""  # of inception: an .npz in ADM's format
    c.eval.every = 50_000  # steps
    c.eval.num_samples = 10_000
    return c
