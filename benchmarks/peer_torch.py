"""The PyTorch side of `benchmarks.peer`: SiT with SRA 2's head, and its training step.

Written for the comparison, with the names of the reference `SiT` network
(willisma/SiT), so that `sra2_jax.weights.sit` writes its weights. Two ways to train it:

- eager: what the field's scripts do. Eager mode, float16 autocast with a gradient
  scaler, AdamW with its defaults, an EMA in a loop over the parameters, the loss read
  every step.
- tuned: draws, network and losses in one torch.compile, bfloat16 autocast, fused
  AdamW, clip and EMA with the foreach kernels, no number read before the end.

Both use scaled_dot_product_attention and TF32 where the device has it; on a CPU both
compute in float32. Nothing here may import JAX.
"""

import ctypes
import math
import os
import re
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_FEATURES = 256


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def patchify(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) to tokens (B, T, p * p * C); in a token row, column, channel."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


class TimeEmbedder(nn.Module):
    """Features [cos, sin] of the time through two linear layers."""

    def __init__(self, width: int, time_scale: float) -> None:
        super().__init__()
        half = TIME_FEATURES // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
        self.register_buffer("frequencies", time_scale * frequencies, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block with adaLN-Zero."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.mlp = MLP(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(
            6, dim=1
        )
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """The network and, on the tokens of block `align.vae.depth`, SRA 2's head.

    `config` is the whole config of the project as a dict.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        model, align = config["model"], config["align"]["vae"]
        side, channels = config["latents"]["size"], config["latents"]["channels"]
        width, p = model["width"], model["patch_size"]
        self.patch_size, self.aligned = p, align["depth"]
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, p, p)
        self.t_embedder = TimeEmbedder(width, model["time_scale"])
        self.y_embedder = nn.Module()
        labels = config["data"]["num_classes"] + 1
        self.y_embedder.embedding_table = nn.Embedding(labels, width)
        tokens = (side // p) ** 2
        self.pos_embed = nn.Parameter(
            torch.zeros(1, tokens, width), requires_grad=False
        )
        hidden = int(width * model["mlp_ratio"] + 1e-6)
        self.blocks = nn.ModuleList(
            Block(width, model["heads"], hidden) for _ in range(model["depth"])
        )
        self.final_layer = FinalLayer(width, p * p * channels)
        inner = align["head_width"] or 2 * width
        sizes = [width] + [inner] * (align["head_layers"] - 1)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes, [*sizes[1:], p * p * channels], strict=True):
            layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        self.sra2_head = nn.Sequential(*layers[:-1])

    def start(self) -> None:
        """SiT's initial weights; the position table stays as it was loaded."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        modulations = [b.adaLN_modulation[-1] for b in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), t (B,), y (B,) -> velocity like x, head's (B, T, p*p*C)."""
        b, c, h, w = x.shape
        p = self.patch_size
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        for number, block in enumerate(self.blocks, 1):
            tokens = block(tokens, condition)
            if number == self.aligned:
                predicted = self.sra2_head(tokens)
        out = self.final_layer(tokens, condition)
        out = out.reshape(b, h // p, w // p, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(b, c, h, w), predicted


class Worker:
    """What `benchmarks.peer_worker` asks for."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def facts(self) -> dict[str, Any]:
        """The device and the versions, in words."""
        name, text = "cpu", f"torch {torch.__version__}"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name()
            text += f", CUDA {torch.version.cuda}"
        else:
            blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
            text += f", {torch.get_num_threads()} threads, own kernels for "
            text += f"{torch.backends.cpu.get_cpu_capability()}, BLAS "
            text += f"{blas[1] if blas else 'unknown'}{mkl_code()}"
        return {"device": self.device.type, "name": name, "text": text}

    def check(self, config: dict[str, Any], weights: str, out: str) -> dict[str, Any]:
        """Write velocity, loss and grad_norm in float32 for a file of ours."""
        self.config, align = config, config["align"]["vae"]
        torch.backends.cudnn.allow_tf32 = False  # the convolution's default is True
        with np.load(weights, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        state = {k[7:]: v for k, v in arrays.items() if k.startswith("weight/")}
        self.model = SiT(config)
        self.model.load_state_dict(state)
        self.model.to(self.device)
        del state
        z, mean, noise, t, y = (
            arrays[f"input/{name}"].to(self.device)
            for name in ("z", "mean", "noise", "t", "y")
        )
        z, mean, noise = (x.permute(0, 3, 1, 2) for x in (z, mean, noise))
        latent = z if align["target"] == "sample" else mean
        velocity, loss = self.losses(z, latent, noise, t, y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf)
        self.model.zero_grad(set_to_none=True)
        velocity = velocity.detach().permute(0, 2, 3, 1).cpu().numpy()
        np.savez(out, velocity=velocity, loss=loss.item(), grad_norm=norm.item())
        return {}

    def losses(
        self, z: Tensor, latent: Tensor, noise: Tensor, t: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The velocity and SRA 2's total loss, for data z and the target `latent`."""
        align, time_ = self.config["align"]["vae"], t[:, None, None, None]
        velocity, predicted = self.model((1 - time_) * z + time_ * noise, t, y)
        denoise = F.mse_loss(velocity.float(), noise - z)
        target = patchify(latent, self.model.patch_size)
        aligned = F.smooth_l1_loss(predicted.float(), target, beta=align["beta"])
        return velocity, denoise + align["weight"] * aligned

    def drawn_loss(self) -> Tensor:
        """The loss of the batch with all of a step's draws."""
        config, batch = self.config, self.batch
        scale = config["latents"]["scaling_factor"]
        mean = scale * (batch["mean"].float() - config["latents"]["shift_factor"])
        z = mean + scale * batch["std"].float() * torch.randn_like(mean)
        noise, t = torch.randn_like(z), torch.rand(len(z), device=z.device)
        dropped = torch.rand(len(z), device=z.device) < config["label_dropout"]
        null = config["data"]["num_classes"]
        y = torch.where(dropped, null, batch["label"])
        latent = z if config["align"]["vae"]["target"] == "sample" else mean
        kind = self.autocast
        with torch.autocast(self.device.type, kind, enabled=kind is not None):
            return self.losses(z, latent, noise, t, y)[1]

    def prepare(self, mode: str, dtype: str, batch: str) -> dict[str, Any]:
        """Initial weights, optimizer and the batch of a file on the device; warms up.

        Needs `check` before. A dtype other than float32 means the mode's own 16 bits.
        """
        torch.set_float32_matmul_precision("high")  # TF32, as the field's scripts
        torch.backends.cudnn.allow_tf32 = True
        optim = self.config["optim"]
        with np.load(batch, allow_pickle=False) as file:
            self.batch = {k: torch.from_numpy(file[k]) for k in file.files}
        for name, x in self.batch.items():
            x = x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x.long()
            self.batch[name] = x.to(self.device)
        torch.manual_seed(0)
        self.model.start()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.parameters]
        own = torch.float16 if mode == "eager" else torch.bfloat16
        half = self.device.type == "cuda" and dtype != "float32"
        self.autocast = own if half else None
        rest = {"eps": optim["eps"], "weight_decay": optim["weight_decay"]}
        rest |= {"fused": True} if mode == "tuned" else {}
        rate, betas = optim["learning_rate"], (optim["b1"], optim["b2"])
        self.optimizer = torch.optim.AdamW(self.parameters, rate, betas, **rest)
        began = time.perf_counter()
        if mode == "tuned":
            self.loss = torch.compile(self.drawn_loss)
            self.step = self.tuned_step
        else:
            self.loss, self.step = self.drawn_loss, self.eager_step
            scaled = self.autocast == torch.float16
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        float(self.step())
        return {"prepare_seconds": time.perf_counter() - began}

    def eager_step(self) -> float:
        config, scaler = self.config, self.scaler
        loss = self.loss()
        self.optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, config["optim"]["clip_norm"])
        scaler.step(self.optimizer)
        scaler.update()
        decay = config["ema_decay"]
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.parameters, strict=True):
                average.mul_(decay).add_(parameter.data, alpha=1 - decay)
        return loss.item()

    def tuned_step(self) -> Tensor:
        config = self.config
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        clip = config["optim"]["clip_norm"]
        nn.utils.clip_grad_norm_(self.parameters, clip, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - config["ema_decay"])
        return loss.detach()

    def run(self, steps: int) -> dict[str, Any]:
        """One step to wake up, then `steps` timed ones; seconds of one of them.

        The memory that a GPU needed for them is given back afterwards, as other
        workers want it.
        """
        float(self.step())
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = self.step()
        loss = float(loss)  # waits for all that the device was given before
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
        return {
            "seconds": seconds / steps,
            "cpu_seconds": cpu / steps,
            "loss": loss,
            "peak_bytes": peak,
        }


def mkl_code() -> str:
    """Which processor's code MKL runs here, as it says itself; "" without MKL."""
    if not torch.backends.mkl.is_available():
        return ""
    matrix = torch.ones(64, 64)
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
            matrix @ matrix
        ctypes.CDLL(None).fflush(None)  # MKL writes through C's buffer
        os.dup2(kept, 1)
        os.close(kept)
        file.seek(0)
        said = file.read().decode(errors="replace")
    code = re.search(r"64 architecture (.*?),", said)
    return f" running code for {code[1]}" if code else ""
