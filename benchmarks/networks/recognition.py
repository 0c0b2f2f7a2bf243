"""Text, faces, images beside tables, several heads, metric learning, tracking."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Crnn(nn.Module):
    """Convolutions down to one row, two bidirectional LSTMs, log-probabilities for CTC."""

    class BidirectionalLSTM(nn.Module):
        """As everybody's crnn.py has it."""

        def __init__(self, n_in: int, n_hidden: int, n_out: int) -> None:
            super().__init__()
            self.rnn = nn.LSTM(n_in, n_hidden, bidirectional=True)
            self.embedding = nn.Linear(n_hidden * 2, n_out)

        def forward(self, x: Tensor) -> Tensor:
            """`(time, batch, n_out)`."""
            recurrent, _ = self.rnn(x)
            t, b, h = recurrent.size()
            return self.embedding(recurrent.view(t * b, h)).view(t, b, -1)

    def __init__(self, n_classes: int = 20, n_hidden: int = 32) -> None:
        super().__init__()
        cnn = nn.Sequential()
        widths, c = (16, 32, 64, 64), 1
        for i, width in enumerate(widths):
            cnn.add_module(f"conv{i}", nn.Conv2d(c, width, 3, 1, 1))
            if i > 1:
                cnn.add_module(f"batchnorm{i}", nn.BatchNorm2d(width))
            cnn.add_module(f"relu{i}", nn.ReLU(True))
            cnn.add_module(f"pool{i}", nn.MaxPool2d(2) if i < 2 else nn.MaxPool2d((2, 1)))
            c = width
        cnn.add_module("last", nn.Conv2d(c, 64, (2, 1)))
        self.cnn = cnn
        self.rnn = nn.Sequential(
            self.BidirectionalLSTM(64, n_hidden, n_hidden),
            self.BidirectionalLSTM(n_hidden, n_hidden, n_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(time, batch, classes)`, the batch second."""
        conv = self.cnn(x)
        _, _, h, _ = conv.size()
        assert h == 1, "the height of conv must be 1"
        conv = conv.squeeze(2).permute(2, 0, 1)
        return F.log_softmax(self.rnn(conv), dim=2)


class Svtr(nn.Module):
    """Patches by convolutions, mixing blocks with fused attention, CTC by a linear layer."""

    class Block(nn.Module):
        """Attention and MLP, norms in front."""

        def __init__(self, d: int, heads: int) -> None:
            super().__init__()
            self.heads, self.scale = heads, (d // heads) ** -0.5
            self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.fc1, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, x: Tensor) -> Tensor:
            """`(b, n, d)`."""
            b, n, d = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
            x = x + self.proj((attn @ v).transpose(1, 2).reshape(b, n, d))
            return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def __init__(self, n_classes: int = 30, d: int = 48) -> None:
        super().__init__()
        self.patch = nn.Sequential(
            nn.Conv2d(3, d // 2, 3, 2, 1), nn.BatchNorm2d(d // 2), nn.GELU(),
            nn.Conv2d(d // 2, d, 3, 2, 1), nn.BatchNorm2d(d), nn.GELU(),
        )  # fmt: skip
        self.pos = nn.Parameter(torch.zeros(1, 8 * 16, d))
        self.blocks = nn.ModuleList(self.Block(d, 4) for _ in range(2))
        self.merge, self.norm = nn.Conv2d(d, 96, 3, (2, 1), 1), nn.LayerNorm(96)
        self.head = nn.Linear(96, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, width / 4, classes)`."""
        x = self.patch(x)
        b, c, h, w = x.shape
        x = x.flatten(2).transpose(1, 2) + self.pos
        for blk in self.blocks:
            x = blk(x)
        x = self.merge(x.transpose(1, 2).reshape(b, c, h, w))
        x = self.norm(x.permute(0, 2, 3, 1)).mean(1)
        return self.head(F.hardswish(x))


class MobileFaceNet(nn.Module):
    """PReLU, depthwise blocks with shortcuts, a global depthwise convolution, unit embeddings."""

    class DepthWise(nn.Module):
        """Expansion, depthwise, projection."""

        def __init__(self, i: int, o: int, s: int, e: int, residual: bool = False) -> None:
            super().__init__()
            self.residual = residual
            self.body = nn.Sequential(
                nn.Conv2d(i, e, 1, bias=False), nn.BatchNorm2d(e), nn.PReLU(e),
                nn.Conv2d(e, e, 3, s, 1, groups=e, bias=False), nn.BatchNorm2d(e), nn.PReLU(e),
                nn.Conv2d(e, o, 1, bias=False), nn.BatchNorm2d(o),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            """With a shortcut where it fits."""
            return x + self.body(x) if self.residual else self.body(x)

    def __init__(self, d: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.PReLU(32)
        )
        self.stages = nn.Sequential(
            self.DepthWise(32, 48, 2, 64), self.DepthWise(48, 48, 1, 96, True),
            self.DepthWise(48, 64, 2, 96), self.DepthWise(64, 64, 1, 128, True),
        )  # fmt: skip
        self.sep = nn.Sequential(
            nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128), nn.PReLU(128)
        )
        self.gdc = nn.Sequential(
            nn.Conv2d(128, 128, (7, 7), groups=128, bias=False), nn.BatchNorm2d(128)
        )
        self.linear, self.bn = nn.Linear(128, d, bias=False), nn.BatchNorm1d(d)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings of length 1, for `(n, 3, 56, 56)`."""
        x = self.gdc(self.sep(self.stages(self.conv1(x))))
        return F.normalize(self.bn(self.linear(x.view(x.size(0), -1))), dim=1)


class ImageAndTable(nn.Module):
    """An image, numbers, and the number of a category; by keyword."""

    def __init__(self, n_numbers: int = 6, n_categories: int = 10, n_classes: int = 4) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.embed = nn.Embedding(n_categories, 8)
        self.table = nn.Sequential(
            nn.Linear(n_numbers + 8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2)
        )
        self.film = nn.Linear(32, 96)
        self.head = nn.Sequential(nn.Linear(48 + 32, 40), nn.ReLU(), nn.Linear(40, n_classes))

    def forward(self, image: Tensor, numbers: Tensor, category: Tensor) -> Tensor:
        """Class scores; the table scales and shifts the features (FiLM)."""
        t = self.table(torch.cat([numbers, self.embed(category)], dim=1))
        f = self.cnn(image).flatten(1)
        gamma, beta = self.film(t).chunk(2, dim=1)
        return self.head(torch.cat([f * (1 + gamma) + beta, t], dim=1))


class ManyHeads(nn.Module):
    """A shared body; classes, age, landmarks and an embedding in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList()
        for i, o in ((3, 24), (24, 40), (40, 64)):
            self.body.append(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False))
            self.body.append(nn.BatchNorm2d(o))
        self.shared = nn.Linear(64, 64)
        self.kind, self.age = nn.Linear(64, 5), nn.Linear(64, 1)
        self.points = nn.Sequential(nn.Conv2d(64, 32, 1), nn.ReLU6(), nn.Conv2d(32, 10, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """One entry a task."""
        for k in range(0, len(self.body), 2):
            x = F.relu_(self.body[k + 1](self.body[k](x)))
        z = F.dropout(x.mean([2, 3]), 0.3, self.training)
        z = torch.tanh(self.shared(z))
        return {
            "class": self.kind(z),
            "age": self.age(z).squeeze(1).sigmoid() * 100,
            "points": self.points(x).reshape(-1, 5, 2),
        }


class Siamese(nn.Module):
    """One body for two images; the absolute difference, and a distance."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3), nn.BatchNorm2d(48), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(48 * 49, 64), nn.ReLU(), nn.Linear(64, 32),
        )  # fmt: skip
        self.out = nn.Linear(32, 1)

    def forward_once(self, x: Tensor) -> Tensor:
        """The embedding of one image."""
        return self.body(x)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """How likely both are the same, and how far apart."""
        ea, eb = self.forward_once(a), self.forward_once(b)
        return torch.sigmoid(self.out((ea - eb).abs())), F.pairwise_distance(ea, eb)


class Triplet(nn.Module):
    """Anchor, positive and negative in one batch, chunked apart behind the body."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.InstanceNorm2d(32, affine=True), nn.ELU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.InstanceNorm2d(64, affine=True), nn.ELU(),
        )  # fmt: skip
        self.p = nn.Parameter(torch.tensor(3.0))
        self.fc = nn.Linear(64, 32)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, ...]:
        """Three embeddings; pooled by a generalised mean with a learned exponent."""
        x = self.features(torch.cat((anchor, positive, negative)))
        x = x.clamp(min=1e-6).pow(self.p).mean((-2, -1)).pow(1.0 / self.p)
        return F.normalize(self.fc(x)).chunk(3)


class SiamFC(nn.Module):
    """Cross-correlation of a template with a search image, as a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 24, 5, 2), nn.BatchNorm2d(24), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2), nn.Conv2d(24, 48, 3), nn.BatchNorm2d(48), nn.ReLU(inplace=True),
            nn.Conv2d(48, 32, 3),
        )  # fmt: skip
        self.scale, self.bias = 0.001, nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Response map `(n, 1, h, w)`."""
        fz, fx = self.net(z), self.net(x)
        n, c, h, w = fx.size()
        out = F.conv2d(fx.view(1, n * c, h, w), fz, groups=n)
        return out.view(n, 1, out.size(-2), out.size(-1)) * self.scale + self.bias


class SiamRPN(nn.Module):
    """Depthwise cross-correlation, and heads for classes and boxes."""

    def __init__(self, n_anchors: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(True), nn.Conv2d(32, 48, 3, 2),
        )  # fmt: skip
        self.kernel, self.search = nn.Conv2d(48, 40, 3), nn.Conv2d(48, 40, 3)
        self.head = nn.Sequential(nn.Conv2d(40, 40, 1), nn.BatchNorm2d(40), nn.ReLU(True))
        self.cls, self.loc = nn.Conv2d(40, 2 * n_anchors, 1), nn.Conv2d(40, 4 * n_anchors, 1)

    def forward(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class and box maps."""
        kernel, search = self.kernel(self.body(z)), self.search(self.body(x))
        batch, channel = kernel.shape[:2]
        x = search.view(1, batch * channel, search.size(2), search.size(3))
        kernel = kernel.view(batch * channel, 1, kernel.size(2), kernel.size(3))
        out = F.conv2d(x, kernel, groups=batch * channel)
        out = self.head(out.view(batch, channel, out.size(2), out.size(3)))
        return self.cls(out), self.loc(out)
