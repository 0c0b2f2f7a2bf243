"""Detectors and keypoints: YOLO with FPN and PAN, SSD, CenterNet, hourglass, HRNet."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(c1: int, c2: int, k: int = 1, s: int = 1) -> nn.Sequential:
    """Convolution, norm, SiLU."""
    return nn.Sequential(
        nn.Conv2d(c1, c2, k, s, k // 2, bias=False),
        nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03),
        nn.SiLU(inplace=True),
    )


class Bottleneck(nn.Module):
    """Two convolutions, with a shortcut where one is wanted."""

    def __init__(self, c: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = conv(c, c, 3), conv(c, c, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        """As YOLOv5 has it."""
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Halves, a chain of bottlenecks over one of them, and all of it concatenated."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1, self.cv2 = conv(c1, 2 * self.c), conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Bottleneck(self.c, shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        """As YOLOv8 has it."""
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """Three poolings in a row, concatenated."""

    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(c1, c1 // 2), conv(c1 * 2, c2)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        """As YOLOv5 has it."""
        y = [self.cv1(x)]
        for _ in range(3):
            y.append(self.m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class YoloHead(nn.Module):
    """Boxes as distributions of distances; decoded unless it trains."""

    bins: Tensor

    def __init__(self, n_classes: int, channels: tuple[int, ...], reg_max: int = 8) -> None:
        super().__init__()
        self.nc, self.reg_max, self.no = n_classes, reg_max, n_classes + 4 * reg_max
        self.box = nn.ModuleList(
            nn.Sequential(conv(c, 32, 3), conv(32, 32, 3), nn.Conv2d(32, 4 * reg_max, 1))
            for c in channels
        )
        self.cls = nn.ModuleList(
            nn.Sequential(conv(c, 40, 3), conv(40, 40, 3), nn.Conv2d(40, n_classes, 1))
            for c in channels
        )
        self.strides = (8, 16, 32)
        self.register_buffer("bins", torch.arange(reg_max, dtype=torch.float32))

    def forward(self, feats: list[Tensor]) -> Tensor | list[Tensor]:
        """`(n, 4 + classes, anchors)`, or the raw maps."""
        raw = [
            torch.cat((b(x), c(x)), 1) for x, b, c in zip(feats, self.box, self.cls, strict=True)
        ]
        if self.training:
            return raw
        flat = torch.cat([r.view(r.shape[0], self.no, -1) for r in raw], 2)
        dist, cls = flat.split((4 * self.reg_max, self.nc), 1)
        n, _, a = dist.shape
        dist = dist.view(n, 4, self.reg_max, a).softmax(2)
        ltrb = (dist * self.bins.view(1, 1, -1, 1)).sum(2)
        centres, scale = [], []
        for r, s in zip(raw, self.strides, strict=True):
            h, w = r.shape[2:]
            gy, gx = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            centres.append(torch.stack((gx.reshape(-1), gy.reshape(-1))).to(r) + 0.5)
            scale.append(torch.full((h * w,), float(s)).to(r))
        centre, stride = torch.cat(centres, 1), torch.cat(scale)
        lt, rb = ltrb.chunk(2, 1)
        box = torch.cat((centre - lt, centre + rb), 1) * stride
        return torch.cat((box, cls.sigmoid()), 1)


class Yolo(nn.Module):
    """Backbone, a path down (FPN), a path up (PAN), three heads."""

    def __init__(self, n_classes: int = 6) -> None:
        super().__init__()
        self.stem = conv(3, 16, 3, 2)
        self.d2 = nn.Sequential(conv(16, 32, 3, 2), C2f(32, 32, 1, True))
        self.d3 = nn.Sequential(conv(32, 64, 3, 2), C2f(64, 64, 2, True))
        self.d4 = nn.Sequential(conv(64, 96, 3, 2), C2f(96, 96, 2, True))
        self.d5 = nn.Sequential(conv(96, 128, 3, 2), C2f(128, 128, 1, True), SPPF(128, 128))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.n4, self.n3 = C2f(128 + 96, 96), C2f(96 + 64, 64)
        self.down3, self.p4 = conv(64, 64, 3, 2), C2f(64 + 96, 96)
        self.down4, self.p5 = conv(96, 96, 3, 2), C2f(96 + 128, 128)
        self.head = YoloHead(n_classes, (64, 96, 128))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Boxes and scores of `(n, 3, h, w)` with sides that 32 divides."""
        c3 = self.d3(self.d2(self.stem(x)))
        c4 = self.d4(c3)
        c5 = self.d5(c4)
        n4 = self.n4(torch.cat([self.up(c5), c4], 1))
        n3 = self.n3(torch.cat([self.up(n4), c3], 1))
        p4 = self.p4(torch.cat([self.down3(n3), n4], 1))
        p5 = self.p5(torch.cat([self.down4(p4), c5], 1))
        return self.head([n3, p4, p5])


class YoloV3(nn.Module):
    """Darknet blocks and anchors, whose maps are viewed apart anchor by anchor."""

    anchors: Tensor

    def __init__(self, n_classes: int = 5) -> None:
        super().__init__()
        self.na, self.no = 3, n_classes + 5
        self.b1 = nn.Sequential(self.cbl(3, 16, 3, 2), self.cbl(16, 32, 3, 2))
        self.b2 = nn.Sequential(self.cbl(32, 64, 3, 2), self.cbl(64, 32, 1), self.cbl(32, 64, 3))
        self.b3 = nn.Sequential(self.cbl(64, 128, 3, 2), self.cbl(128, 64, 1))
        self.lateral = self.cbl(64, 32, 1)
        self.out3, self.out2 = nn.Conv2d(64, 30, 1), nn.Conv2d(96, 30, 1)
        self.register_buffer("anchors", torch.tensor([[10.0, 13], [16, 30], [33, 23]]))

    @staticmethod
    def cbl(i: int, o: int, k: int, s: int = 1) -> nn.Sequential:
        """Convolution, norm, leaky ReLU."""
        return nn.Sequential(
            nn.Conv2d(i, o, k, s, (k - 1) // 2, bias=False), nn.BatchNorm2d(o),
            nn.LeakyReLU(0.1, inplace=True),
        )  # fmt: skip

    def decode(self, p: Tensor, stride: int) -> Tensor:
        """`(n, 3 * h * w, 5 + classes)`."""
        b, _, ny, nx = p.shape
        p = p.view(b, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
        yv, xv = torch.meshgrid([torch.arange(ny), torch.arange(nx)], indexing="ij")
        grid = torch.stack((xv, yv), 2).view(1, 1, ny, nx, 2).to(p.dtype)
        xy = (p[..., 0:2].sigmoid() + grid) * stride
        wh = p[..., 2:4].clamp(max=4).exp() * self.anchors.view(1, self.na, 1, 1, 2)
        return torch.cat((xy, wh, p[..., 4:].sigmoid()), -1).view(b, -1, self.no)

    def forward(self, x: Tensor) -> Tensor:
        """All boxes of both scales."""
        c2 = self.b2(self.b1(x))
        c3 = self.b3(c2)
        up = F.interpolate(self.lateral(c3), scale_factor=2.0, mode="nearest")
        return torch.cat(
            [self.decode(self.out3(c3), 16), self.decode(self.out2(torch.cat([up, c2], 1)), 8)], 1
        )


class Ssd(nn.Module):
    """VGG features, extra layers, L2 norm with a learned scale, permuted and viewed heads."""

    def __init__(self, n_classes: int = 7) -> None:
        super().__init__()
        self.n_classes = n_classes
        layers: list[nn.Module] = []
        c = 3
        for width in (16, "M", 32, "M", 64, 64):
            if width == "M":
                layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
            else:
                layers += [nn.Conv2d(c, int(width), 3, padding=1), nn.ReLU(inplace=True)]
                c = int(width)
        self.vgg = nn.ModuleList(layers)
        self.scale = nn.Parameter(torch.full((64,), 20.0))
        self.extras = nn.ModuleList([
            nn.Conv2d(64, 64, 3, 2, 1), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 64, 3, 2, 1),
        ])  # fmt: skip
        widths = (64, 64, 64)
        self.loc = nn.ModuleList(nn.Conv2d(w, 4 * 4, 3, padding=1) for w in widths)
        self.conf = nn.ModuleList(nn.Conv2d(w, 4 * n_classes, 3, padding=1) for w in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Offsets and class scores of every prior box."""
        sources = []
        for layer in self.vgg:
            x = layer(x)
        norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10
        sources.append(self.scale[None, :, None, None] * x / norm)
        for k, layer in enumerate(self.extras):
            x = F.relu(layer(x), inplace=True)
            if k != 1:
                sources.append(x)
        loc, conf = [], []
        for s, to_loc, to_conf in zip(sources, self.loc, self.conf, strict=True):
            loc.append(to_loc(s).permute(0, 2, 3, 1).contiguous())
            conf.append(to_conf(s).permute(0, 2, 3, 1).contiguous())
        flat_loc = torch.cat([o.view(o.size(0), -1) for o in loc], 1)
        flat_conf = torch.cat([o.view(o.size(0), -1) for o in conf], 1)
        return {
            "loc": flat_loc.view(flat_loc.size(0), -1, 4),
            "conf": flat_conf.view(flat_conf.size(0), -1, self.n_classes).softmax(-1),
        }


class CenterNet(nn.Module):
    """A small ResNet, transposed convolutions, one head a task in a dict; peaks by max-pooling."""

    def __init__(self, heads: dict[str, int] | None = None) -> None:
        super().__init__()
        self.heads = heads or {"hm": 4, "wh": 2, "reg": 2}
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 7, 2, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.conv1, self.bn1 = nn.Conv2d(24, 48, 3, 2, 1, bias=False), nn.BatchNorm2d(48)
        self.conv2, self.bn2 = nn.Conv2d(48, 48, 3, 1, 1, bias=False), nn.BatchNorm2d(48)
        self.down = nn.Sequential(nn.Conv2d(24, 48, 1, 2, bias=False), nn.BatchNorm2d(48))
        self.deconv = nn.Sequential(
            nn.ConvTranspose2d(48, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
        )  # fmt: skip
        for name, n in self.heads.items():
            head = nn.Sequential(
                nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, n, 1)
            )
            if "hm" in name:
                nn.init.constant_(head[-1].bias, -2.19)  # type: ignore[arg-type]
            setattr(self, name, head)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """A map for each head."""
        x = self.stem(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        x = self.deconv(F.relu(out))
        ret = {name: getattr(self, name)(x) for name in self.heads}
        hm = ret["hm"].sigmoid()
        if not self.training:
            keep = (F.max_pool2d(hm, 3, stride=1, padding=1) == hm).to(hm.dtype)
            hm = hm * keep
        ret["hm"] = hm
        return ret


class Hourglass(nn.Module):
    """Recursion down and up, twice, with the first heatmaps fed back."""

    class Residual(nn.Module):
        """Pre-activation bottleneck."""

        def __init__(self, c: int) -> None:
            super().__init__()
            self.bn, self.c1 = nn.BatchNorm2d(c), nn.Conv2d(c, c // 2, 1)
            self.bn1, self.c2 = nn.BatchNorm2d(c // 2), nn.Conv2d(c // 2, c // 2, 3, 1, 1)
            self.bn2, self.c3 = nn.BatchNorm2d(c // 2), nn.Conv2d(c // 2, c, 1)

        def forward(self, x: Tensor) -> Tensor:
            """A sum."""
            out = self.c1(F.relu(self.bn(x)))
            out = self.c2(F.relu(self.bn1(out)))
            return self.c3(F.relu(self.bn2(out))) + x

    class Glass(nn.Module):
        """One level, with the next one in it."""

        def __init__(self, depth: int, c: int) -> None:
            super().__init__()
            make = Hourglass.Residual
            self.up1, self.low1, self.low3 = make(c), make(c), make(c)
            self.low2: nn.Module = make(c) if depth == 1 else Hourglass.Glass(depth - 1, c)

        def forward(self, x: Tensor) -> Tensor:
            """The sum of both ways."""
            low = self.low3(self.low2(self.low1(F.max_pool2d(x, 2))))
            return self.up1(x) + F.interpolate(low, scale_factor=2)

    def __init__(self, n_joints: int = 8, c: int = 48, n_stack: int = 2) -> None:
        super().__init__()
        self.pre = nn.Sequential(nn.Conv2d(3, c, 7, 2, 3), nn.BatchNorm2d(c), nn.ReLU(True))
        self.glasses = nn.ModuleList(self.Glass(2, c) for _ in range(n_stack))
        self.features = nn.ModuleList(self.Residual(c) for _ in range(n_stack))
        self.outs = nn.ModuleList(nn.Conv2d(c, n_joints, 1) for _ in range(n_stack))
        self.back = nn.ModuleList(nn.Conv2d(c, c, 1) for _ in range(n_stack - 1))
        self.back_out = nn.ModuleList(nn.Conv2d(n_joints, c, 1) for _ in range(n_stack - 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Heatmaps of every stack."""
        x = self.pre(x)
        preds = []
        for i, glass in enumerate(self.glasses):
            y = self.features[i](glass(x))
            preds.append(self.outs[i](y))
            if i < len(self.glasses) - 1:
                x = x + self.back[i](y) + self.back_out[i](preds[-1])
        return preds


class HRNet(nn.Module):
    """Two resolutions side by side, exchanged twice; key points by soft-argmax."""

    def __init__(self, n_joints: int = 7) -> None:
        super().__init__()
        self.stem = nn.Sequential(self.unit(3, 32, 2), self.unit(32, 32, 2))
        self.t1, self.t2 = self.unit(32, 24), self.unit(32, 48, 2)
        self.b1 = nn.ModuleList(self.unit(24, 24) for _ in range(2))
        self.b2 = nn.ModuleList(self.unit(48, 48) for _ in range(2))
        self.down = nn.ModuleList(self.unit(24, 48, 2) for _ in range(2))
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(48, 24, 1, bias=False), nn.BatchNorm2d(24)) for _ in range(2)
        )
        self.final = nn.Conv2d(24, n_joints, 1)

    @staticmethod
    def unit(i: int, o: int, s: int = 1) -> nn.Sequential:
        """Convolution, norm, ReLU."""
        return nn.Sequential(
            nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Heatmaps, and `(n, joints, 2)` coordinates."""
        x = self.stem(x)
        hi, lo = self.t1(x), self.t2(x)
        for b1, b2, down, up in zip(self.b1, self.b2, self.down, self.up, strict=True):
            h, w = b1(hi), b2(lo)
            size = h.shape[-2:]
            hi = F.relu(h + F.interpolate(up(w), size=size, mode="bilinear", align_corners=False))
            lo = F.relu(w + down(h))
        heat = self.final(hi)
        n, j, hh, ww = heat.size()
        prob = heat.view(n, j, -1).softmax(-1).view(n, j, hh, ww)
        xs = (prob.sum(2) * torch.linspace(0, 1, ww).to(heat)).sum(-1)
        ys = (prob.sum(3) * torch.linspace(0, 1, hh).to(heat)).sum(-1)
        return heat, torch.stack((xs, ys), -1) * math.sqrt(2)
