"""Every configuration key, once, with its unit. Other configs state what differs.

Values are the paper's SRA 2 at XL/2, 256 px (arXiv 2601.17830) unless said otherwise.
"""

from ml_collections import ConfigDict

# size -> (width, depth, heads)
SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


def set_size(config: ConfigDict, size: str) -> None:
    """Set the network to one of SiT's sizes."""
    config.model.width, config.model.depth, config.model.heads = SIZES[size]


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
    c.model.scan = True  # blocks as a loop, or unrolled
    c.model.remat = "dots"  # rematerialisation: none, dots, full
    c.model.attention = "xla"  # xla, cudnn
    c.model.dtype = "bfloat16"  # compute type: bfloat16, float32

    c.label_dropout = 0.1  # share of labels replaced by the null label

    c.transport = ConfigDict()
    c.transport.path = "linear"  # linear, gvp, vp
    c.transport.prediction = "velocity"  # velocity, noise, data
    c.transport.time = "uniform"  # uniform, lognormal
    c.transport.time_mean = 0.0  # of log(sigma / alpha), lognormal only
    c.transport.time_std = 1.0

    c.align = ConfigDict()
    c.align.vae = ConfigDict()
    c.align.vae.enabled = True
    c.align.vae.depth = 8  # aligned block, 1-based
    c.align.vae.weight = 1.0  # lambda
    c.align.vae.schedule = "constant"  # constant, linear, cosine, exponential
    c.align.vae.schedule_start = 0  # step at which the weight begins to fall
    c.align.vae.schedule_steps = 1  # steps of the fall (exponential: tenfold)
    c.align.vae.loss = "smooth_l1"  # smooth_l1, l1, l2, cosine
    c.align.vae.beta = 0.05  # of smooth_l1
    c.align.vae.target = "sample"  # sample (the latent x_t is built from), mean
    c.align.vae.zscore = False  # standardise both sides per sample
    c.align.vae.t_min = 0.0  # times aligned, 0 = data
    c.align.vae.t_max = 1.0
    c.align.vae.head_layers = 5
    c.align.vae.head_width = 2.0  # multiple of the model's width
    c.align.vae.head_final_layer = False  # end in a layer like DiT's final one

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

    c.sampling = ConfigDict()
    c.sampling.method = "euler_maruyama"  # euler, heun, euler_maruyama
    c.sampling.steps = 250
    c.sampling.guidance = 1.0  # 1 = off
    c.sampling.guidance_low = 0.0  # guided where low <= t <= high
    c.sampling.guidance_high = 1.0
    c.sampling.guidance_channels = 0  # guide the first channels only; 0 = all
    c.sampling.rounding = "truncate"  # to uint8: truncate (REPA, SRA), sit (SiT, DiT)
    c.sampling.batch_size = 64  # images sampled at a time, over all devices

    c.run = ConfigDict()
    c.run.log_every = 100  # steps
    c.run.checkpoint_every = 10_000
    c.run.keep_checkpoints = 3
    c.run.sample_every = 50_000
    c.run.grid_classes = 8  # rows of a sample grid, spread over the classes
    c.run.grid_columns = 8

    c.eval = ConfigDict()
    c.eval.proxy = ""  # "digits": the quickstart's proxy metrics; "" = none
    c.eval.every = 50_000  # steps
    c.eval.num_samples = 1000
    return c
