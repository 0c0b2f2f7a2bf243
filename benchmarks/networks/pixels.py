"""Image in, image out: super-resolution, denoising, depth, segmentation, generators."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Edsr(nn.Module):
    """Residual blocks without norms, scaled by 0.1, and PixelShuffle; the mean taken off."""

    mean: Tensor

    class Block(nn.Module):
        """Two convolutions."""

        def __init__(self, n: int, res_scale: float = 0.1) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(n, n, 3, padding=1), nn.ReLU(True), nn.Conv2d(n, n, 3, padding=1)
            )
            self.res_scale = res_scale

        def forward(self, x: Tensor) -> Tensor:
            """As EDSR-PyTorch has it."""
            res = self.body(x).mul(self.res_scale)
            res += x
            return res

    def __init__(self, n: int = 48, n_blocks: int = 4, scale: int = 4) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1))
        self.head = nn.Conv2d(3, n, 3, padding=1)
        self.body = nn.Sequential(
            *(self.Block(n) for _ in range(n_blocks)), nn.Conv2d(n, n, 3, padding=1)
        )
        tail: list[nn.Module] = []
        for _ in range(int(math.log2(scale))):
            tail += [nn.Conv2d(n, 4 * n, 3, padding=1), nn.PixelShuffle(2)]
        self.tail = nn.Sequential(*tail, nn.Conv2d(n, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Four times as large."""
        x = self.head(x - self.mean)
        res = self.body(x)
        res += x
        return self.tail(res) + self.mean


class Rcan(nn.Module):
    """Residual groups of residual blocks with channel attention."""

    class CALayer(nn.Module):
        """Squeeze, excite, multiply."""

        def __init__(self, c: int, reduction: int = 8) -> None:
            super().__init__()
            self.avg_pool = nn.AdaptiveAvgPool2d(1)
            self.conv_du = nn.Sequential(
                nn.Conv2d(c, c // reduction, 1), nn.ReLU(inplace=True),
                nn.Conv2d(c // reduction, c, 1), nn.Sigmoid(),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            """Scaled."""
            return x * self.conv_du(self.avg_pool(x))

    class Rcab(nn.Module):
        """A block."""

        def __init__(self, c: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(c, c, 3, padding=1), nn.ReLU(True), nn.Conv2d(c, c, 3, padding=1),
                Rcan.CALayer(c),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            """With its shortcut."""
            res = self.body(x)
            res += x
            return res

    def __init__(self, c: int = 32, n_groups: int = 2) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, c, 3, padding=1)
        self.groups = nn.ModuleList(
            nn.Sequential(self.Rcab(c), self.Rcab(c), nn.Conv2d(c, c, 3, padding=1))
            for _ in range(n_groups)
        )
        self.tail = nn.Sequential(nn.Conv2d(c, 9 * 3, 3, padding=1), nn.PixelShuffle(3))

    def forward(self, x: Tensor) -> Tensor:
        """Three times as large, added to what bilinear resizing gives."""
        y = self.head(x)
        for group in self.groups:
            y = group(y) + y
        up = F.interpolate(x, scale_factor=3, mode="bilinear", align_corners=False)
        return (self.tail(y) + up).clamp(0, 1)


class DnCnn(nn.Module):
    """Seventeen layers that find the noise; here seven."""

    def __init__(self, depth: int = 7, n: int = 48) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, n, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            layers.append(nn.Conv2d(n, n, 3, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(n, eps=0.0001, momentum=0.95))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Conv2d(n, 1, 3, padding=1, bias=False))
        self.dncnn = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Without its noise."""
        return x - self.dncnn(x)


class DenoisingUNet(nn.Module):
    """A diffusion-like U-Net: the time embedded by sines, GroupNorm, skips concatenated."""

    class Block(nn.Module):
        """Two convolutions with the time added between."""

        def __init__(self, i: int, o: int, t: int) -> None:
            super().__init__()
            self.norm1, self.conv1 = nn.GroupNorm(8, i), nn.Conv2d(i, o, 3, padding=1)
            self.time = nn.Linear(t, o)
            self.norm2, self.conv2 = nn.GroupNorm(8, o), nn.Conv2d(o, o, 3, padding=1)
            self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

        def forward(self, x: Tensor, emb: Tensor) -> Tensor:
            """As DDPM has it."""
            h = self.conv1(F.silu(self.norm1(x)))
            h = h + self.time(F.silu(emb))[:, :, None, None]
            return self.conv2(F.silu(self.norm2(h))) + self.skip(x)

    def __init__(self, c: int = 32, t: int = 64) -> None:
        super().__init__()
        self.t_dim = c
        self.mlp = nn.Sequential(nn.Linear(c, t), nn.SiLU(), nn.Linear(t, t))
        self.inc = nn.Conv2d(3, c, 3, padding=1)
        self.d1, self.down1 = self.Block(c, c, t), nn.Conv2d(c, c, 3, 2, 1)
        self.d2, self.down2 = self.Block(c, 2 * c, t), nn.Conv2d(2 * c, 2 * c, 3, 2, 1)
        self.mid = self.Block(2 * c, 2 * c, t)
        self.u2, self.u1 = self.Block(4 * c, 2 * c, t), self.Block(3 * c, c, t)
        self.out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise in `x` at the times `t`, `(n,)`."""
        half = self.t_dim // 2
        freq = torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half).to(x.dtype)
        arg = t[:, None].to(x.dtype) * freq[None]
        emb = self.mlp(torch.cat([arg.sin(), arg.cos()], dim=-1))
        h1 = self.d1(self.inc(x), emb)
        h2 = self.d2(self.down1(h1), emb)
        h = self.mid(self.down2(h2), emb)
        h = self.u2(torch.cat([F.interpolate(h, scale_factor=2.0), h2], 1), emb)
        h = self.u1(torch.cat([F.interpolate(h, scale_factor=2.0), h1], 1), emb)
        return self.out(h)


class Depth(nn.Module):
    """Encoder and decoder with skips that are padded to fit; disparities of three scales."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64, 96)
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(True))
            for i, o in zip((3, *widths), widths, strict=False)
        )
        self.upconvs = nn.ModuleList(nn.Conv2d(i, o, 3) for i, o in ((96, 64), (64, 32), (32, 16)))
        self.iconvs = nn.ModuleList(nn.Conv2d(2 * o, o, 3) for o in (64, 32, 16))
        self.disp = nn.ModuleList(nn.Conv2d(o, 1, 3) for o in (64, 32, 16))
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x: Tensor) -> dict[tuple[str, int], Tensor]:
        """("disp", scale) -> map, as monodepth2 has it."""
        skips = []
        for layer in self.encoder:
            x = layer(x)
            skips.append(x)
        outputs = {}
        x = skips[-1]
        for i, (up, iconv, disp) in enumerate(
            zip(self.upconvs, self.iconvs, self.disp, strict=True)
        ):
            x = F.elu(up(self.pad(x)), inplace=True)
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            skip = skips[-2 - i]
            dh, dw = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
            x = F.pad(x, [dw // 2, dw - dw // 2, dh // 2, dh - dh // 2])
            x = F.elu(iconv(self.pad(torch.cat([x, skip], 1))))
            outputs["disp", 2 - i] = torch.sigmoid(disp(self.pad(x)))
        return outputs


class DeepLab(nn.Module):
    """Dilated convolutions, ASPP with image pooling, and a low-level skip."""

    class Aspp(nn.Module):
        """Parallel rates, concatenated."""

        def __init__(self, i: int, o: int, rates: tuple[int, ...] = (1, 2, 4)) -> None:
            super().__init__()
            self.convs = nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(i, o, 3, padding=r, dilation=r, bias=False), nn.BatchNorm2d(o)
                )
                for r in rates
            )
            self.pool = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(i, o, 1), nn.ReLU(inplace=True)
            )
            self.project = nn.Sequential(
                nn.Conv2d(o * (len(rates) + 1), o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
                nn.Dropout(0.5),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            """`(n, o, h, w)`."""
            size = x.shape[-2:]
            res = [F.relu(c(x)) for c in self.convs]
            res.append(
                F.interpolate(self.pool(x), size=size, mode="bilinear", align_corners=False)
            )
            return self.project(torch.cat(res, dim=1))

    def __init__(self, n_classes: int = 8) -> None:
        super().__init__()
        self.low = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.high = nn.Sequential(
            nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1, 2, dilation=2), nn.BatchNorm2d(64), nn.ReLU(),
        )  # fmt: skip
        self.aspp, self.reduce = self.Aspp(64, 48), nn.Conv2d(32, 16, 1)
        self.last = nn.Sequential(nn.Conv2d(64, 48, 3, padding=1), nn.ReLU())
        self.cls = nn.Conv2d(48, n_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """{"out": scores of every pixel}."""
        low = self.low(x)
        high = self.aspp(self.high(low))
        high = F.interpolate(high, size=low.shape[2:], mode="bilinear", align_corners=True)
        y = self.cls(self.last(torch.cat((high, self.reduce(low)), 1)))
        return {"out": F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=True)}


class SegNet(nn.Module):
    """Pooling keeps its indices; unpooling takes them."""

    def __init__(self, n_classes: int = 5) -> None:
        super().__init__()
        self.e1, self.e2 = self.block(3, 32), self.block(32, 48)
        self.e3 = self.block(48, 64)
        self.d3, self.d2 = self.block(64, 48), self.block(48, 32)
        self.d1 = nn.Conv2d(32, n_classes, 3, padding=1)

    @staticmethod
    def block(i: int, o: int) -> nn.Sequential:
        """Convolution, norm, ReLU, twice."""
        return nn.Sequential(
            nn.Conv2d(i, i, 3, padding=1), nn.BatchNorm2d(i), nn.ReLU(inplace=True),
            nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every pixel."""
        x, i1 = F.max_pool2d(self.e1(x), 2, 2, return_indices=True)
        x, i2 = F.max_pool2d(self.e2(x), 2, 2, return_indices=True)
        x, i3 = F.max_pool2d(self.e3(x), 2, 2, return_indices=True)
        x = self.d3(F.max_unpool2d(x, i3, (2, 2)))
        x = self.d2(F.max_unpool2d(x, i2, (2, 2)))
        return self.d1(F.max_unpool2d(x, i1, (2, 2)))


class PspNet(nn.Module):
    """Pyramid pooling; an auxiliary head while it trains."""

    def __init__(self, n_classes: int = 6, bins: tuple[int, ...] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.layer0 = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
            nn.Conv2d(32, 48, 3, 2, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.layer1 = nn.Sequential(
            nn.Conv2d(48, 64, 3, 1, 2, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        )
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(b), nn.Conv2d(64, 16, 1, bias=False), nn.BatchNorm2d(16),
                nn.ReLU(inplace=True),
            )
            for b in bins
        )  # fmt: skip
        self.cls = nn.Sequential(
            nn.Conv2d(128, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48),
            nn.ReLU(inplace=True), nn.Dropout2d(0.1), nn.Conv2d(48, n_classes, 1),
        )  # fmt: skip
        self.aux = nn.Conv2d(48, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Scores of every pixel."""
        size = x.shape[2:]
        mid = self.layer0(x)
        y = self.layer1(mid)
        out = [y]
        for f in self.features:
            out.append(F.interpolate(f(y), y.shape[2:], mode="bilinear", align_corners=True))
        y = F.interpolate(self.cls(torch.cat(out, 1)), size, mode="bilinear", align_corners=True)
        return (y, self.aux(mid)) if self.training else y


class BiSeNet(nn.Module):
    """A spatial path, a context path with attention refinement, and their fusion."""

    class Cbr(nn.Sequential):
        """Convolution, norm, ReLU."""

        def __init__(self, i: int, o: int, k: int = 3, s: int = 1) -> None:
            super().__init__(
                nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
            )

    class Arm(nn.Module):
        """Attention refinement."""

        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.conv = BiSeNet.Cbr(i, o)
            self.atten, self.bn = nn.Conv2d(o, o, 1, bias=False), nn.BatchNorm2d(o)

        def forward(self, x: Tensor) -> Tensor:
            """Gated."""
            feat = self.conv(x)
            atten = F.avg_pool2d(feat, feat.size()[2:])
            return torch.mul(feat, self.bn(self.atten(atten)).sigmoid())

    def __init__(self, n_classes: int = 6) -> None:
        super().__init__()
        cbr = self.Cbr
        self.spatial = nn.Sequential(cbr(3, 24, 3, 2), cbr(24, 24, 3, 2), cbr(24, 48, 3, 2))
        self.c8 = nn.Sequential(cbr(3, 16, 3, 2), cbr(16, 32, 3, 2), cbr(32, 48, 3, 2))
        self.c16, self.c32 = cbr(48, 64, 3, 2), cbr(64, 96, 3, 2)
        self.arm16, self.arm32 = self.Arm(64, 48), self.Arm(96, 48)
        self.conv_avg = cbr(96, 48, 1)
        self.head16 = cbr(48, 48)
        self.fuse = cbr(96, 64, 1)
        self.f1, self.f2 = nn.Conv2d(64, 16, 1, bias=False), nn.Conv2d(16, 64, 1, bias=False)
        self.out = nn.Conv2d(64, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every pixel."""
        f8 = self.c8(x)
        f16 = self.c16(f8)
        f32 = self.c32(f16)
        avg = self.conv_avg(F.avg_pool2d(f32, f32.shape[2:]))
        up32 = self.arm32(f32) + F.interpolate(avg, f32.shape[2:], mode="nearest")
        f16 = self.arm16(f16) + F.interpolate(up32, f16.shape[2:], mode="nearest")
        cp = self.head16(F.interpolate(f16, f8.shape[2:], mode="nearest"))
        feat = self.fuse(torch.cat([self.spatial(x), cp], dim=1))
        atten = self.f2(F.relu_(self.f1(F.adaptive_avg_pool2d(feat, 1)))).sigmoid_()
        y = self.out(feat * atten + feat)
        return F.interpolate(y, scale_factor=8.0, mode="bilinear", align_corners=False)


class AttentionUNet(nn.Module):
    """Skips gated by what comes from below."""

    class Gate(nn.Module):
        """Additive attention."""

        def __init__(self, g: int, x: int, inter: int) -> None:
            super().__init__()
            self.w_g = nn.Sequential(nn.Conv2d(g, inter, 1), nn.BatchNorm2d(inter))
            self.w_x = nn.Sequential(nn.Conv2d(x, inter, 1), nn.BatchNorm2d(inter))
            self.psi = nn.Sequential(nn.Conv2d(inter, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())
            self.relu = nn.ReLU(inplace=True)

        def forward(self, g: Tensor, x: Tensor) -> Tensor:
            """`x`, gated."""
            return x * self.psi(self.relu(self.w_g(g) + self.w_x(x)))

    def __init__(self, n_classes: int = 2) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = self.twice(1, 24), self.twice(24, 48), self.twice(48, 96)
        self.up3, self.up2 = nn.ConvTranspose2d(96, 48, 2, 2), nn.ConvTranspose2d(48, 24, 2, 2)
        self.g3, self.g2 = self.Gate(48, 48, 24), self.Gate(24, 24, 12)
        self.u3, self.u2 = self.twice(96, 48), self.twice(48, 24)
        self.last = nn.Conv2d(24, n_classes, 1)

    @staticmethod
    def twice(i: int, o: int) -> nn.Sequential:
        """Two convolutions."""
        return nn.Sequential(
            nn.Conv2d(i, o, 3, 1, 1), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
            nn.Conv2d(o, o, 3, 1, 1), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities of every pixel."""
        x1 = self.c1(x)
        x2 = self.c2(F.max_pool2d(x1, 2))
        x3 = self.c3(F.max_pool2d(x2, 2))
        d3 = self.up3(x3)
        d3 = self.u3(torch.cat((self.g3(d3, x2), d3), dim=1))
        d2 = self.up2(d3)
        d2 = self.u2(torch.cat((self.g2(d2, x1), d2), dim=1))
        return self.last(d2).softmax(dim=1)
