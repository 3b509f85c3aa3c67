"""Train the digit reader of nexus/evaluate/classify.py on the embedded MNIST digits: `python scripts/train_digits.py`.

Prints the accuracy on the 2,000 test digits, and writes the weights when it is at least 99 %.
"""

import sys

import torch
import torch.nn.functional as F

from nexus.checkpoint import tensor_bytes
from nexus.data.images import open_images
from nexus.data.order import indices
from nexus.evaluate.classify import WEIGHTS, DigitNet, read
from nexus.rng import derive, generator

EPOCHS, BATCH, LR, NEEDED = 8, 50, 4e-3, 0.99


def warped(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """x [B, 1, H, W], each picture turned by up to 12 degrees, resized by up to 12 % and moved by up to 2 pixels."""
    turn, scale = (torch.rand(2, len(x), generator=rng) * 2 - 1).unbind()
    turn, scale = turn * 0.21, 1 + scale * 0.12
    move = (torch.rand(len(x), 2, generator=rng) * 2 - 1) * 4 / x.shape[2]
    rows = torch.stack([torch.stack([turn.cos(), -turn.sin()], 1), torch.stack([turn.sin(), turn.cos()], 1)], 1)
    theta = torch.cat([rows * scale[:, None, None], move[:, :, None]], 2)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def main() -> None:
    """Train, test, write."""
    torch.manual_seed(0)
    train, test = (open_images("mnist", split=split) for split in ("train", "pair"))
    net, steps = DigitNet(), EPOCHS * len(train) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for step in range(steps):
        torch.manual_seed(derive(0, "dropout", step))
        batch = train.batch(indices(len(train), seed=0, step=step, batch=BATCH))
        x = warped((batch["image"] + 1) / 2, generator(0, "warp", step))
        loss = F.cross_entropy(net.train()(x), batch["label"], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1} of {steps}: loss {loss.item():.4f}", flush=True)
    found = read(net.eval(), [test.get(i) for i in range(len(test))])
    right = int((found == torch.from_numpy(test.labels)).sum())
    print(f"{right} of {len(test)} test digits are read rightly: {100 * right / len(test):.2f} %")
    if right < NEEDED * len(test):
        sys.exit("not written: that is less than 99 %")
    WEIGHTS.write_bytes(tensor_bytes(net.state_dict()))
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
