"""Train the small residual digit classifier and write digits.onnx, calibration.npz and verification.npz.

Only needed to make the model again: the example itself runs from the committed files.
Needs torch, scikit-learn, onnx and numpy.
"""

from __future__ import annotations

import argparse
import io
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

SEED = 20240
TRAINING_IMAGES = 1000
CALIBRATION_IMAGES = 256
EPOCHS = 80
BATCH_SIZE = 50
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 1.0
LABEL_SMOOTHING = 0.05
HIDDEN_UNITS = 256
CLASSES = 10
OPSET = 18


@dataclass(frozen=True)
class Split:
    """The images and labels used for training, and those held out."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Build the layers, with a projection shortcut where the shape changes."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.projected = stride != 1 or inputs != outputs
        if self.projected:
            self.project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.project_norm = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Add the convolved features to the shortcut."""
        shortcut = self.project_norm(self.project(features)) if self.projected else features
        hidden = self.relu1(self.norm1(self.conv1(features)))
        return self.relu2(self.norm2(self.conv2(hidden)) + shortcut)


class DigitNetwork(nn.Module):
    """A convolution stem, three residual stages, global average pooling and a two-layer head."""

    def __init__(self) -> None:
        """Build the layers under the names that the exported nodes carry."""
        super().__init__()
        stem = OrderedDict(conv=nn.Conv2d(1, 16, 3, padding=1, bias=False), norm=nn.BatchNorm2d(16), relu=nn.ReLU())
        self.stem = nn.Sequential(stem)
        self.stage1 = make_stage(16, 16, stride=1, blocks=2)
        self.stage2 = make_stage(16, 32, stride=2, blocks=2)
        self.stage3 = make_stage(32, 64, stride=2, blocks=1)
        head = OrderedDict(
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            hidden=nn.Linear(64, HIDDEN_UNITS),
            relu=nn.ReLU(),
            classify=nn.Linear(HIDDEN_UNITS, CLASSES),
        )
        self.head = nn.Sequential(head)

    def forward(self, image: Tensor) -> Tensor:
        """Return one score for each digit."""
        return self.head(self.stage3(self.stage2(self.stage1(self.stem(image)))))


def make_stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    """Chain residual blocks, the first of which changes the shape."""
    first = BasicBlock(inputs, outputs, stride)
    rest = [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(OrderedDict((f"block{number}", block) for number, block in enumerate([first, *rest], 1)))


def load_split() -> Split:
    """Shuffle the digits with the fixed seed and hold out all but the training images."""
    digits = load_digits()
    images = torch.from_numpy((digits.images / 16.0).astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.from_numpy(np.random.RandomState(SEED).permutation(len(labels)))
    train, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return Split(images[train], labels[train], images[test], labels[test])


def shift_randomly(images: Tensor) -> Tensor:
    """Move every image by up to one pixel along each axis."""
    count, _, height, width = images.shape
    padded = functional.pad(images, (1, 1, 1, 1))[:, 0]
    rows = torch.randint(0, 3, (count, 1, 1)) + torch.arange(height).view(1, -1, 1)
    columns = torch.randint(0, 3, (count, 1, 1)) + torch.arange(width).view(1, 1, -1)
    return padded[torch.arange(count).view(-1, 1, 1), rows, columns].unsqueeze(1)


def group_parameters(network: DigitNetwork) -> list[dict[str, object]]:
    """Spare biases and normalizations, which have one axis, the strong decay that makes the weights nearly low-rank."""
    decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    spared = [parameter for parameter in network.parameters() if parameter.ndim == 1]
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]


def train(network: DigitNetwork, split: Split) -> None:
    """Fit the network with a one-cycle schedule and shifted copies of the training images."""
    steps = EPOCHS * (TRAINING_IMAGES // BATCH_SIZE)
    optimizer = torch.optim.AdamW(group_parameters(network), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    network.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAINING_IMAGES).split(BATCH_SIZE):
            scores = network(shift_randomly(split.train_images[batch]))
            loss = functional.cross_entropy(scores, split.train_labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def measure_accuracy(network: DigitNetwork, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose highest score is the right digit."""
    network.eval()
    return (network(images).argmax(1) == labels).double().mean().item()


def export(network: DigitNetwork) -> onnx.ModelProto:
    """Export for inference with every BatchNormalization node kept."""
    network.eval()
    buffer = io.BytesIO()
    torch.onnx.export(
        network,
        (torch.zeros(1, 1, 8, 8),),
        buffer,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        opset_version=OPSET,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        dynamo=False,
    )
    return onnx.load_from_string(buffer.getvalue())


def readable_name(node: onnx.NodeProto) -> str:
    """Return the path of the node's layer, or of the parameter that an Identity shares."""
    if node.op_type == "Identity":
        return "/" + node.output[0].replace(".", "/")
    layer, _, operation = node.name.rpartition("/")
    return f"{layer}/{operation.lower()}" if node.op_type == "Add" else layer


def rename_nodes(model: onnx.ModelProto) -> None:
    """Name every node after its layer, and every intermediate value after the node that makes it."""
    values = {"logits": "logits"}
    for node in model.graph.node:
        node.name = readable_name(node)
        values.setdefault(node.output[0], f"{node.name}/output")
    for node in model.graph.node:
        node.input[:] = [values.get(name, name) for name in node.input]
        node.output[:] = [values[name] for name in node.output]


def clear_notes(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes, which may hold paths of the machine."""
    model.doc_string = ""
    model.graph.doc_string = ""
    for item in [model, model.graph, *model.graph.node]:
        item.ClearField("metadata_props")
    for item in [*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        item.doc_string = ""
    model.graph.ClearField("value_info")
    model.graph.name = "digits"


def check(model: onnx.ModelProto, normalizations: int) -> None:
    """Fail unless the model is valid, has unique node names and kept its normalizations."""
    onnx.checker.check_model(model, full_check=True)
    names = [node.name for node in model.graph.node]
    if "" in names or len(set(names)) != len(names):
        raise ValueError("node names are not unique")
    kept = sum(node.op_type == "BatchNormalization" for node in model.graph.node)
    if kept != normalizations:
        raise ValueError(f"{kept} of {normalizations} BatchNormalization nodes were kept")


def save_images(split: Split, folder: Path) -> None:
    """Write calibration images from the training part, and all held-out images with their labels."""
    calibration = split.train_images[:CALIBRATION_IMAGES].numpy()
    np.savez_compressed(folder / "calibration.npz", image=calibration)
    np.savez_compressed(folder / "verification.npz", image=split.test_images.numpy(), label=split.test_labels.numpy())


def main() -> None:
    """Train, measure and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    folder: Path = parser.parse_args().out
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    split = load_split()
    network = DigitNetwork()
    train(network, split)
    print(f"training accuracy {measure_accuracy(network, split.train_images, split.train_labels):.4f}")
    print(f"test accuracy {measure_accuracy(network, split.test_images, split.test_labels):.4f}")

    model = export(network)
    rename_nodes(model)
    clear_notes(model)
    check(model, normalizations=sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules()))
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "digits.onnx")
    save_images(split, folder)


if __name__ == "__main__":
    main()
