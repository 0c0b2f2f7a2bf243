"""Signals: sound, ECG, EEG, time series, and video."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RawWave(nn.Module):
    """M5: 1-D convolutions over the wave itself."""

    def __init__(self, n: int = 24, n_classes: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1, self.pool1 = (
            nn.Conv1d(1, n, 80, 16),
            nn.BatchNorm1d(n),
            nn.MaxPool1d(4),
        )
        self.conv2, self.bn2, self.pool2 = nn.Conv1d(n, n, 3), nn.BatchNorm1d(n), nn.MaxPool1d(4)
        self.conv3, self.bn3 = nn.Conv1d(n, 2 * n, 3), nn.BatchNorm1d(2 * n)
        self.fc1 = nn.Linear(2 * n, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities, `(n, 1, classes)`."""
        x = self.pool1(F.relu(self.bn1(self.conv1(x))))
        x = self.pool2(F.relu(self.bn2(self.conv2(x))))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.avg_pool1d(x, x.shape[-1]).permute(0, 2, 1)
        return F.log_softmax(self.fc1(x), dim=2)


class Spectrogram(nn.Module):
    """A CNN over mel energies made outside; attention over time."""

    def __init__(self, n_mels: int = 32, n_classes: int = 10) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(n_mels)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
                nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
            )
            for i, o in ((1, 24), (24, 48), (48, 64))
        )  # fmt: skip
        self.fc = nn.Linear(64, 64)
        self.att, self.cla = nn.Conv1d(64, n_classes, 1), nn.Conv1d(64, n_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Of the clip and of every frame, for `(n, 1, time, mels)`."""
        x = self.bn0(x.transpose(1, 3)).transpose(1, 3)
        for block in self.blocks:
            x = F.dropout(F.avg_pool2d(block(x), 2), p=0.2, training=self.training)
        x = torch.mean(x, dim=3)
        x = F.max_pool1d(x, 3, 1, 1) + F.avg_pool1d(x, 3, 1, 1)
        x = F.relu_(self.fc(x.transpose(1, 2))).transpose(1, 2)
        norm_att = torch.softmax(torch.tanh(self.att(x)), dim=-1)
        cla = torch.sigmoid(self.cla(x))
        return {"clip": torch.sum(norm_att * cla, dim=2), "frames": cla}


class DsCnn(nn.Module):
    """Keyword spotting on MFCC: depthwise separable convolutions."""

    def __init__(self, n_classes: int = 12, c: int = 48) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(1, c, (10, 4), 2, (5, 1), bias=False), nn.BatchNorm2d(c), nn.ReLU()
        )
        self.body = nn.Sequential(*(
            nn.Sequential(
                nn.Conv2d(c, c, 3, 1, 1, groups=c, bias=False), nn.BatchNorm2d(c), nn.ReLU(),
                nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(),
            )
            for _ in range(3)
        ))  # fmt: skip
        self.fc = nn.Linear(c, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `(n, time, coefficients)`."""
        x = self.body(self.first(x.unsqueeze(1)))
        return self.fc(F.avg_pool2d(x, x.shape[2:]).squeeze(3).squeeze(2))


class TcResNet(nn.Module):
    """Coefficients as channels, temporal convolutions with shortcuts."""

    class Block(nn.Module):
        """Stride 2 and a 1x1 shortcut."""

        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv1d(i, o, 9, 2, 4, bias=False)
            self.conv2 = nn.Conv1d(o, o, 9, 1, 4, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm1d(o), nn.BatchNorm1d(o)
            self.down = nn.Sequential(nn.Conv1d(i, o, 1, 2, bias=False), nn.BatchNorm1d(o))

        def forward(self, x: Tensor) -> Tensor:
            """A sum."""
            out = F.relu(self.bn1(self.conv1(x)))
            return (self.bn2(self.conv2(out)) + F.relu(self.down(x))).relu_()

    def __init__(self, n_mfcc: int = 20, n_classes: int = 12) -> None:
        super().__init__()
        self.conv = nn.Conv1d(n_mfcc, 16, 3, padding=1, bias=False)
        self.layers = nn.Sequential(*(self.Block(i, o) for i, o in ((16, 24), (24, 32), (32, 48))))
        self.linear = nn.Conv1d(48, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `(n, coefficients, time)`."""
        x = self.layers(self.conv(x))
        return self.linear(x.mean(-1, keepdim=True)).squeeze(-1)


class ConvTasNet(nn.Module):
    """Two voices apart: a learned basis, dilated blocks with global norms, masks, overlap-add."""

    class Block(nn.Module):
        """1x1, PReLU, norm, depthwise, PReLU, norm; residual and skip."""

        def __init__(self, b: int, h: int, dilation: int) -> None:
            super().__init__()
            self.conv1, self.prelu1 = nn.Conv1d(b, h, 1), nn.PReLU()
            self.norm1, self.norm2 = nn.GroupNorm(1, h), nn.BatchNorm1d(h)
            self.dw = nn.Conv1d(h, h, 3, padding=dilation, dilation=dilation, groups=h)
            self.prelu2 = nn.PReLU()
            self.res, self.skip = nn.Conv1d(h, b, 1), nn.Conv1d(h, b, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            """(what goes on, what is summed)."""
            y = self.norm1(self.prelu1(self.conv1(x)))
            y = self.norm2(self.prelu2(self.dw(y)))
            return x + self.res(y), self.skip(y)

    def __init__(self, n: int = 48, b: int = 32, h: int = 64, n_src: int = 2) -> None:
        super().__init__()
        self.n, self.n_src = n, n_src
        self.encoder = nn.Conv1d(1, n, 16, 8, bias=False)
        self.norm, self.bottleneck = nn.BatchNorm1d(n), nn.Conv1d(n, b, 1)
        self.blocks = nn.ModuleList(self.Block(b, h, 2**i) for i in range(3))
        self.mask = nn.Sequential(nn.PReLU(), nn.Conv1d(b, n * n_src, 1))
        self.decoder = nn.ConvTranspose1d(n, 1, 16, 8, bias=False)

    def forward(self, wave: Tensor) -> Tensor:
        """`(n, sources, samples)` of `(n, samples)`."""
        w = F.relu(self.encoder(wave.unsqueeze(1)))
        x = self.bottleneck(self.norm(w))
        total: Tensor | float = 0.0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        m = self.mask(total)
        batch, _, frames = m.shape
        m = F.relu(m.view(batch, self.n_src, self.n, frames))
        est = (w.unsqueeze(1) * m).view(batch * self.n_src, self.n, frames)
        return self.decoder(est).view(batch, self.n_src, -1)


class EcgNet(nn.Module):
    """1-D ResNet over twelve leads with squeeze-excite; age and sex beside it."""

    class Block(nn.Module):
        """Two long convolutions, a gate, a pooled shortcut padded with zeros."""

        def __init__(self, i: int, o: int, stride: int) -> None:
            super().__init__()
            self.stride, self.extra = stride, o - i
            self.conv1 = nn.Conv1d(i, o, 7, stride, 3, bias=False)
            self.conv2 = nn.Conv1d(o, o, 7, 1, 3, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm1d(o), nn.BatchNorm1d(o)
            self.fc1, self.fc2 = nn.Linear(o, o // 8), nn.Linear(o // 8, o)
            self.drop = nn.Dropout(0.2)

        def forward(self, x: Tensor) -> Tensor:
            """A sum."""
            out = self.drop(F.relu(self.bn1(self.conv1(x))))
            out = self.bn2(self.conv2(out))
            s = torch.sigmoid(self.fc2(F.relu(self.fc1(out.mean(-1)))))
            short = F.avg_pool1d(x, self.stride) if self.stride > 1 else x
            if self.extra:
                short = F.pad(short, (0, 0, 0, self.extra))
            return F.relu(out * s.unsqueeze(-1) + short)

    def __init__(self, n_leads: int = 12, n_classes: int = 9) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(n_leads, 32, 15, 2, 7), nn.BatchNorm1d(32), nn.ReLU(), nn.MaxPool1d(2)
        )
        self.layers = nn.Sequential(
            self.Block(32, 32, 1), self.Block(32, 48, 2), self.Block(48, 64, 2)
        )
        self.person = nn.Linear(2, 8)
        self.fc = nn.Linear(64 * 2 + 8, n_classes)

    def forward(self, ecg: Tensor, person: Tensor) -> Tensor:
        """Scores of every finding, for `(n, 12, samples)` and `(n, 2)`."""
        x = self.layers(self.stem(ecg))
        x = torch.cat([F.adaptive_avg_pool1d(x, 1), F.adaptive_max_pool1d(x, 1)], 1).squeeze(-1)
        return self.fc(torch.cat([x, F.relu(self.person(person))], dim=1))


class EegNet(nn.Module):
    """A convolution over time, a depthwise one over electrodes, a separable one."""

    def __init__(self, n_chans: int = 16, f1: int = 8, d: int = 2, n_classes: int = 4) -> None:
        super().__init__()
        f2 = f1 * d
        self.block1 = nn.Sequential(
            nn.Conv2d(1, f1, (1, 33), padding=(0, 16), bias=False), nn.BatchNorm2d(f1),
            nn.Conv2d(f1, f2, (n_chans, 1), groups=f1, bias=False), nn.BatchNorm2d(f2), nn.ELU(),
            nn.AvgPool2d((1, 4)), nn.Dropout(0.25),
        )  # fmt: skip
        self.block2 = nn.Sequential(
            nn.Conv2d(f2, f2, (1, 17), padding=(0, 8), groups=f2, bias=False),
            nn.Conv2d(f2, f2, 1, bias=False), nn.BatchNorm2d(f2), nn.ELU(), nn.AvgPool2d((1, 8)),
        )  # fmt: skip
        self.classify = nn.Linear(f2 * 4, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `(n, electrodes, 128 samples)`."""
        x = self.block2(self.block1(x[:, None]))
        return self.classify(x.reshape(x.shape[0], -1))


class Tcn(nn.Module):
    """Causal dilated convolutions with weight norm, chomped at the end."""

    class Chomp(nn.Module):
        """Takes the padding off again."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def forward(self, x: Tensor) -> Tensor:
            """Shorter."""
            return x[:, :, : -self.size].contiguous()

    class Block(nn.Module):
        """Two of them and a shortcut."""

        def __init__(self, i: int, o: int, dilation: int, k: int = 3) -> None:
            super().__init__()
            pad = (k - 1) * dilation
            norm = nn.utils.parametrizations.weight_norm
            self.net = nn.Sequential(
                norm(nn.Conv1d(i, o, k, padding=pad, dilation=dilation)), Tcn.Chomp(pad),
                nn.ReLU(), nn.Dropout(0.2),
                norm(nn.Conv1d(o, o, k, padding=pad, dilation=dilation)), Tcn.Chomp(pad),
                nn.ReLU(), nn.Dropout(0.2),
            )  # fmt: skip
            self.downsample = nn.Conv1d(i, o, 1) if i != o else None

        def forward(self, x: Tensor) -> Tensor:
            """A sum."""
            res = x if self.downsample is None else self.downsample(x)
            return F.relu(self.net(x) + res)

    def __init__(self, n_series: int = 6, horizon: int = 3) -> None:
        super().__init__()
        self.n_series, self.horizon = n_series, horizon
        widths = (32, 32, 48)
        self.tcn = nn.Sequential(*(
            self.Block(i, o, 2**k)
            for k, (i, o) in enumerate(zip((n_series, *widths), widths, strict=False))
        ))  # fmt: skip
        self.linear = nn.Linear(48, horizon * n_series)

    def forward(self, x: Tensor) -> Tensor:
        """The next values of every series, for `(n, time, series)`; normalised by the last."""
        last = x[:, -1:, :]
        y = self.tcn((x - last).transpose(1, 2))
        out = self.linear(y[:, :, -1]).view(-1, self.horizon, self.n_series)
        return out + last


class CnnLstm(nn.Module):
    """A CNN on every frame, an LSTM over what it finds, the last step classified."""

    def __init__(self, n_classes: int = 5) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.BatchNorm2d(48),
            nn.ReLU(), nn.AdaptiveAvgPool2d((2, 2)),
        )  # fmt: skip
        self.lstm = nn.LSTM(48 * 4, 40, num_layers=1, batch_first=True)
        self.fc = nn.Linear(40, n_classes)

    def forward(self, clip: Tensor) -> Tensor:
        """Class scores of `(n, t, 3, h, w)`."""
        n, t, c, h, w = clip.shape
        f = self.cnn(clip.view(n * t, c, h, w)).view(n, t, -1)
        out, (_h, _c) = self.lstm(f)
        return self.fc(out[:, -1])


class R2Plus1d(nn.Module):
    """Space and time in convolutions of their own."""

    class Factored(nn.Sequential):
        """One of each, a norm between."""

        def __init__(self, i: int, o: int, stride: int = 1) -> None:
            mid = (i * o * 27) // (i * 9 + 3 * o)
            super().__init__(
                nn.Conv3d(i, mid, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
                nn.BatchNorm3d(mid), nn.ReLU(inplace=True),
                nn.Conv3d(mid, o, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
            )  # fmt: skip

    def __init__(self, n_classes: int = 6) -> None:
        super().__init__()
        make = self.Factored
        self.stem = nn.Sequential(make(3, 24, 2), nn.BatchNorm3d(24), nn.ReLU(inplace=True))
        self.a1, self.b1 = make(24, 24), nn.BatchNorm3d(24)
        self.a2, self.b2 = make(24, 48, 2), nn.BatchNorm3d(48)
        self.short = nn.Conv3d(24, 48, 1, 2, bias=False)
        self.fc = nn.Linear(48, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `(n, 3, t, h, w)`."""
        x = self.stem(x)
        x = F.relu(self.b1(self.a1(x)) + x)
        x = F.relu(self.b2(self.a2(x)) + self.short(x))
        return self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))


class Tsm(nn.Module):
    """Channels shifted in time within a batch of frames, by assignment into slices."""

    class Block(nn.Module):
        """Shift, then two convolutions and a shortcut."""

        def __init__(self, c: int, n_segment: int) -> None:
            super().__init__()
            self.n_segment, self.fold_div = n_segment, 8
            self.conv1, self.bn1 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)
            self.conv2, self.bn2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)

        def shift(self, x: Tensor) -> Tensor:
            """As the paper's code has it."""
            nt, c, h, w = x.size()
            x = x.view(nt // self.n_segment, self.n_segment, c, h, w)
            fold = c // self.fold_div
            out = torch.zeros_like(x)
            out[:, :-1, :fold] = x[:, 1:, :fold]
            out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
            out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
            return out.view(nt, c, h, w)

        def forward(self, x: Tensor) -> Tensor:
            """A sum."""
            out = F.relu(self.bn1(self.conv1(self.shift(x))), inplace=True)
            return F.relu(self.bn2(self.conv2(out)) + x)

    def __init__(self, n_segment: int = 4, n_classes: int = 6) -> None:
        super().__init__()
        self.n_segment = n_segment
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU())
        self.b1 = self.Block(32, n_segment)
        self.down = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.b2 = self.Block(64, n_segment)
        self.fc = nn.Linear(64, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `(n * segments, 3, h, w)`, averaged over the segments."""
        x = self.b2(self.down(self.b1(self.stem(x))))
        x = self.fc(x.mean((2, 3)))
        return x.view((-1, self.n_segment, *x.size()[1:])).mean(dim=1)


class SlowFast(nn.Module):
    """Two streams of one clip, the fast one handed over to the slow one."""

    def __init__(self, alpha: int = 4, n_classes: int = 6) -> None:
        super().__init__()
        self.alpha = alpha
        self.slow1, self.fast1 = self.unit(3, 32, (1, 5, 5), 2), self.unit(3, 8, (5, 5, 5), 2)
        self.lateral = nn.Conv3d(8, 16, (5, 1, 1), (alpha, 1, 1), (2, 0, 0), bias=False)
        self.slow2, self.fast2 = self.unit(48, 64, (1, 3, 3), 2), self.unit(8, 16, (3, 3, 3), 2)
        self.head = nn.Linear(80, n_classes)

    @staticmethod
    def unit(i: int, o: int, k: tuple[int, int, int], s: int) -> nn.Sequential:
        """Convolution, norm, ReLU; no stride in time."""
        pad = (k[0] // 2, k[1] // 2, k[2] // 2)
        return nn.Sequential(
            nn.Conv3d(i, o, k, (1, s, s), pad, bias=False), nn.BatchNorm3d(o), nn.ReLU(True)
        )

    def forward(self, clip: Tensor) -> Tensor:
        """Class scores of `(n, 3, t, h, w)`."""
        slow, fast = clip[:, :, :: self.alpha], clip
        slow, fast = self.slow1(slow), self.fast1(fast)
        slow = torch.cat([slow, self.lateral(fast)], dim=1)
        slow, fast = self.slow2(slow), self.fast2(fast)
        pooled = [F.adaptive_avg_pool3d(each, 1).flatten(1) for each in (slow, fast)]
        return self.head(torch.cat(pooled, dim=1))
