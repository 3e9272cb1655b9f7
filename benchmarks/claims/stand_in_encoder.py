"""Trains a small vision transformer on the classes of photographs, as a stand-in for a pretrained encoder of
`loss.semantic` where no published weights are at hand.

    python benchmarks/claims/stand_in_encoder.py --train TARS --test TARS --steps 1500 --out probe/test_vit.safetensors

The network is timm's `test_vit.r160_in1k` with mean pooling in place of the class token, so that the classes reach the
patch features that `loss.semantic` takes. Classes are balanced within each batch. Prints the accuracy on the test
pictures. The file has the names of timm's weights, without the classifier.
"""

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from data import evaluation_images

NAME = "test_vit.r160_in1k"
SIDE = 160
BATCH = 32


def read(paths: list[str]) -> tuple[Tensor, Tensor]:
    """uint8 images ``(n, 3, SIDE, SIDE)`` and their classes."""
    images = list(evaluation_images(paths, image_size=SIDE))
    return torch.stack([image.image_chw for image in images]), torch.tensor([image.label for image in images])


def normalized(images_nchw: Tensor, mean: tuple, std: tuple) -> Tensor:
    mean_c11, std_c11 = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (images_nchw.float() / 255 - mean_c11) / std_c11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, nargs="+")
    parser.add_argument("--test", required=True, nargs="+")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images_nchw, label_n = read(arguments.train)
    known, label_n = label_n.unique(return_inverse=True)
    model = timm.create_model(NAME, num_classes=len(known), global_pool="avg", fc_norm=False)
    how = {name: model.pretrained_cfg[name] for name in ("mean", "std")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=arguments.steps)
    chance_n = 1.0 / label_n.bincount()[label_n]
    for step in range(arguments.steps):
        chosen = torch.multinomial(chance_n, BATCH, replacement=True)
        batch = normalized(images_nchw[chosen], **how)
        batch = batch.flip(-1) if step % 2 else batch
        loss = F.cross_entropy(model(batch), label_n[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{arguments.steps}  loss {loss.item():.3f}", flush=True)
    model.eval()
    test_nchw, test_label_n = read(arguments.test)
    with torch.no_grad():
        right = known[torch.cat([model(normalized(part, **how)).argmax(1) for part in test_nchw.split(BATCH)])]
    right = (right == test_label_n).double()
    balanced = torch.stack([right[test_label_n == label].mean() for label in test_label_n.unique()]).mean()
    print(f"accuracy on {len(right)} test pictures: {right.mean():.1%}, mean over classes {balanced:.1%}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items() if not name.startswith("head.")}
    save_file(state, arguments.out)


if __name__ == "__main__":
    main()
