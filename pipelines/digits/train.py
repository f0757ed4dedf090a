"""Trains the bundled ResNet on digits: python -m octavo.pipelines.digits.train [FOLDER]. Two minutes on one core."""

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from ..images import CONFIG, Preprocessing, preprocessing_of
from .data import Part, digits

MODEL = Path(__file__).parent / "model"
SIZE = 32  # pixels of a side after preprocessing
EPOCHS, BATCH, PEAK = 60, 64, 4e-3  # epochs, pictures of a batch, largest learning rate
PREPROCESSING = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIZE, "width": SIZE},
    "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.3, 0.3, 0.3], "image_std": [0.37, 0.37, 0.37],
}  # fmt: skip


def resnet() -> ResNetForImageClassification:
    """Makes the untrained model, of 180 thousand parameters."""
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=3, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic",
            id2label={digit: str(digit) for digit in range(10)}, label2id={str(digit): digit for digit in range(10)},
        )
    )  # fmt: skip


def inputs_of(part: Part, preprocessing: Preprocessing) -> Tensor:
    """Returns the preprocessed pictures of `part`, (n, 3, 32, 32)."""
    return torch.stack([preprocessing(Image.fromarray(values)) for values in part.pictures])


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Augments pictures `x` (n, 3, 32, 32): rotates each up to 15 degrees, scales up to 15 %, moves up to 3 pixels, by
    random numbers of `generator`."""
    current, grow, right, down = (torch.rand(4, len(x), generator=generator) * 2 - 1).unbind()
    angle, size = current * math.radians(15), 1 + 0.15 * grow
    across, along = size * angle.cos(), size * angle.sin()
    shift = 6 / SIZE
    rows = torch.stack([across, -along, shift * right, along, across, shift * down], 1).view(-1, 2, 3)
    background = float(x.min())  # black, also outside the picture
    return F.grid_sample(x - background, F.affine_grid(rows, list(x.shape), False), align_corners=False) + background


def accuracy(model: ResNetForImageClassification, x: Tensor, labels: Tensor) -> float:
    """Returns the share of the pictures `x` (n, 3, 32, 32) whose largest logit is that of their digit in `labels`
    (n,)."""
    model.eval()
    with torch.no_grad():
        return float((model(x).logits.argmax(1) == labels).float().mean())


def train(x: Tensor, labels: Tensor) -> ResNetForImageClassification:
    """Trains a new model on the pictures `x` (n, 3, 32, 32) and their digits `labels` (n,) with AdamW.

    The learning rate rises for two epochs and then falls as a cosine.
    """
    torch.manual_seed(0)
    model, generator = resnet(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, steps, pct_start=2 / EPOCHS)
    began = time.monotonic()
    for epoch in range(EPOCHS):
        model.train()
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            if len(rows) < BATCH:
                continue
            logits = model(moved(x[rows], generator)).logits
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return model.eval()


def main(folder: Path) -> None:
    """Trains the model, writes it to `folder`, and prints which share of held-out pictures it gets right."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(PREPROCESSING, indent=2) + "\n")
    training, held_out = digits()
    preprocessing = preprocessing_of(folder)
    model = train(inputs_of(training, preprocessing), torch.from_numpy(training.labels))
    model.save_pretrained(folder)
    share = accuracy(model, inputs_of(held_out, preprocessing), torch.from_numpy(held_out.labels))
    print(f"{folder}: {share:.2%} of {len(held_out.labels)} held-out digits are right")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL)
