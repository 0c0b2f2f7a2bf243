"""Classifiers with gates; VAE, GAN, points, mixers, graphs, text."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gated(nn.Module):
    """A small residual network with one kind of gate behind every block."""

    def __init__(self, gate: type[nn.Module], n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layers = nn.ModuleList()
        for i, o in ((32, 32), (32, 64), (64, 64)):
            self.layers.append(nn.ModuleDict({
                "conv1": nn.Conv2d(i, o, 3, o // i, 1, bias=False), "bn1": nn.BatchNorm2d(o),
                "conv2": nn.Conv2d(o, o, 3, 1, 1, bias=False), "bn2": nn.BatchNorm2d(o),
                "gate": gate(o),
                "short": nn.Identity() if i == o else nn.Conv2d(i, o, 1, 2),
            }))  # fmt: skip
        self.fc = nn.Linear(64, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for layer in self.layers:
            out = F.relu(layer["bn1"](layer["conv1"](x)))  # type: ignore[index]
            out = layer["gate"](layer["bn2"](layer["conv2"](out)))  # type: ignore[index]
            x = F.relu(out + layer["short"](x))  # type: ignore[index]
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


class Se(nn.Module):
    """Squeeze and excite, with linear layers and views."""

    def __init__(self, c: int, r: int = 8) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(c, c // r, bias=False), nn.ReLU(inplace=True),
            nn.Linear(c // r, c, bias=False), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Scaled."""
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        return x * self.fc(y).view(b, c, 1, 1).expand_as(x)


class Cbam(nn.Module):
    """Channels gated by mean and maximum, then pixels by mean and maximum over channels."""

    def __init__(self, c: int, r: int = 8) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(c, c // r, 1), nn.ReLU(), nn.Conv2d(c // r, c, 1))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gated twice."""
        avg, top = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        x = x * torch.sigmoid(self.mlp(avg) + self.mlp(top))
        maps = torch.cat([torch.mean(x, 1, keepdim=True), torch.max(x, 1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.spatial(maps))


class Eca(nn.Module):
    """A 1-D convolution along the channels."""

    def __init__(self, c: int, k: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, k, padding=(k - 1) // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled."""
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * y.sigmoid().expand_as(x)


class GcBlock(nn.Module):
    """Global context: softmax over pixels, a product, a transform with LayerNorm."""

    def __init__(self, c: int, r: int = 4) -> None:
        super().__init__()
        self.mask = nn.Conv2d(c, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(c, c // r, 1), nn.LayerNorm([c // r, 1, 1]), nn.ReLU(inplace=True),
            nn.Conv2d(c // r, c, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """With the context added."""
        b, c, h, w = x.size()
        flat = x.view(b, c, h * w).unsqueeze(1)
        mask = self.mask(x).view(b, 1, h * w).softmax(2).unsqueeze(-1)
        context = torch.matmul(flat, mask).view(b, c, 1, 1)
        return x + self.add(context)


class Vae(nn.Module):
    """Encoder, means and variances, decoder; draws only while it trains."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.enc = nn.Sequential(
            nn.Conv2d(1, 24, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(24, 48, 4, 2, 1),
            nn.BatchNorm2d(48), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.mu, self.logvar = nn.Linear(48 * 49, d), nn.Linear(48 * 49, d)
        self.fc = nn.Linear(d, 48 * 7 * 7)
        self.dec = nn.Sequential(
            nn.ConvTranspose2d(48, 24, 4, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.ConvTranspose2d(24, 1, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, means, logarithms of variances."""
        h = self.enc(x).view(-1, 48 * 7 * 7)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu
        if self.training:
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return self.dec(self.fc(z).view(-1, 48, 7, 7)).sigmoid(), mu, logvar


class Generator(nn.Module):
    """DCGAN with a class: both embedded, then transposed convolutions up to 32 pixels."""

    def __init__(self, nz: int = 24, ngf: int = 24, n_classes: int = 5) -> None:
        super().__init__()
        self.label = nn.Embedding(n_classes, nz)
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 4, 4, 1, 0, bias=False), nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        """Images of noise `(n, nz)` and classes `(n,)`."""
        return self.main((z * self.label(label))[..., None, None])


class PointNet(nn.Module):
    """Shared 1-D convolutions, a learned 3x3 transform, a maximum over points."""

    def __init__(self, n_classes: int = 8) -> None:
        super().__init__()
        self.tnet = nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU())
        self.tfc = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 9))
        self.conv1, self.conv2 = nn.Conv1d(3, 48, 1), nn.Conv1d(48, 96, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(48), nn.BatchNorm1d(96)
        self.fc1, self.fc2 = nn.Linear(96, 48), nn.Linear(48, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities of `(n, 3, points)`."""
        t = self.tfc(torch.max(self.tnet(x), 2)[0])
        iden = torch.eye(3).flatten().view(1, 9).to(x).repeat(x.size(0), 1)
        t = (t + iden).view(-1, 3, 3)
        x = torch.bmm(x.transpose(2, 1), t).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 96)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=-1)


class Mixer(nn.Module):
    """MLPs over tokens and over channels."""

    class Block(nn.Module):
        """One of each."""

        def __init__(self, n: int, d: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.tokens = nn.Sequential(nn.Linear(n, 64), nn.GELU(), nn.Linear(64, n))
            self.channels = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

        def forward(self, x: Tensor) -> Tensor:
            """Both added."""
            x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.norm2(x))

    def __init__(self, n_classes: int = 6, d: int = 48) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, d, 8, 8)
        self.blocks = nn.Sequential(*(self.Block(16, d) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `(n, 3, 32, 32)`."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class SkeletonGraph(nn.Module):
    """ST-GCN: joints mixed by an adjacency with einsum, time by convolutions."""

    class Block(nn.Module):
        """Graph, then time, then a shortcut."""

        def __init__(self, i: int, o: int, k: int) -> None:
            super().__init__()
            self.k, self.conv = k, nn.Conv2d(i, o * k, 1)
            self.tcn = nn.Sequential(
                nn.BatchNorm2d(o), nn.ReLU(inplace=True), nn.Conv2d(o, o, (5, 1), 1, (2, 0)),
                nn.BatchNorm2d(o),
            )  # fmt: skip
            self.residual = nn.Conv2d(i, o, 1)

        def forward(self, x: Tensor, a: Tensor) -> Tensor:
            """`(n, o, t, v)`."""
            res = self.residual(x)
            x = self.conv(x)
            n, kc, t, v = x.size()
            x = x.view(n, self.k, kc // self.k, t, v)
            x = torch.einsum("nkctv,kvw->nctw", (x, a))
            return F.relu(self.tcn(x.contiguous()) + res, inplace=True)

    def __init__(self, n_joints: int = 9, n_classes: int = 6) -> None:
        super().__init__()
        a = torch.rand(3, n_joints, n_joints, generator=torch.Generator().manual_seed(1))
        self.register_buffer("A", a / a.sum(1, keepdim=True))
        self.data_bn = nn.BatchNorm1d(3 * n_joints)
        self.blocks = nn.ModuleList(self.Block(i, o, 3) for i, o in ((3, 32), (32, 32), (32, 64)))
        self.importance = nn.ParameterList(torch.ones(3, n_joints, n_joints) for _ in range(3))
        self.fcn = nn.Conv2d(64, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `(n, 3, t, joints)`."""
        n, c, t, v = x.size()
        x = self.data_bn(x.permute(0, 3, 1, 2).contiguous().view(n, v * c, t))
        x = x.view(n, v, c, t).permute(0, 2, 3, 1).contiguous()
        for block, imp in zip(self.blocks, self.importance, strict=True):
            x = block(x, self.A * imp)
        x = F.avg_pool2d(x, x.size()[2:])
        return self.fcn(x).view(n, -1)


class TextTransformer(nn.Module):
    """Token numbers, positions, torch's own encoder layers, mean over what is no padding."""

    def __init__(self, n_tokens: int = 50, d: int = 32, n_classes: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, d, padding_idx=0)
        self.pos = nn.Parameter(torch.randn(1, 16, d) * 0.02)
        layer = nn.TransformerEncoderLayer(
            d, 4, dim_feedforward=128, dropout=0.1, batch_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Sequential(nn.Linear(d, 64), nn.Tanh(), nn.Linear(64, n_classes))

    def forward(self, ids: Tensor) -> Tensor:
        """Class scores of `(n, 16)` whole numbers."""
        mask = (ids != 0).unsqueeze(-1)
        h = self.encoder(self.embedding(ids) + self.pos[:, : ids.size(1)])
        h = (h * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.classifier(h)
