"""When is a linear-time mixer worth it? Seeded pictures in which the class of a structure depends on a marker at a distance.

    python docs/examples/context.py results --networks ss_nd conv --seeds 0 1
    python docs/examples/context_results.py results --plot context.png

Each picture is noise with one bright disc, the structure, and small squares. A marker is a square that is bright or dark; that alone decides whether
the disc is of class 1 or 2. Its centre lies at a given distance from the disc's.

- task "kind": one marker, in a random direction. Whether it is bright or dark gives the class.
- task "side": a bright marker on one side of the disc and a dark one on the other, along the last axis. The class is that of the first one: what a
  picture holds says nothing, only where it is.

Chequered squares at random places mean nothing. No voxel outside the markers depends on the class: a network that does not see them names half of the
discs rightly. Dice of a class is 2 |found and true| / (|found| + |true|) over all test pictures; the mean of both classes is then 0.5 at most.

A network is trained on pictures of all distances, each seen once, and tested on the same pictures as every other. A run is one JSON file. One that is
there is left as it is, and one that was stopped goes on from its last save.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

import medssm
from medssm import machine
from medssm.bench.networks import multiply_adds
from medssm.files import atomic, read_json, write_json
from medssm.nn.blocks import CONV, MixerBlock, image, tokens
from medssm.nn.mixers import MIXERS

DISTANCES = {"kind": (7, 12, 17, 22, 27), "side": (7, 12, 17, 22, 27)}
SHAPES = {("kind", 2): (32, 32), ("side", 2): (20, 64), ("kind", 3): (12, 32, 32), ("side", 3): (12, 20, 64)}  # by task and number of axes
RADIUS, SQUARE, DISTRACTORS, NOISE = 3, 5, 2, 0.3
EDGE = SQUARE // 2
SAVE = 50  # steps between two saves


# -- the task ---------------------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """image (*spatial) float32; label (*spatial) uint8, 0 outside the disc and its class inside; the centres of the disc and of its markers."""

    image: np.ndarray
    label: np.ndarray
    disc: np.ndarray
    markers: list[np.ndarray]


def draw(task: str, distance: float, kind: int, random: np.random.Generator, dims: int = 2) -> Picture:
    """One picture of class `kind`, 1 or 2. What is drawn from `random` does not depend on it: both kinds differ in the markers alone."""
    shape = SHAPES[task, dims]
    disc, markers = _places(task, distance, random, np.array(shape))
    picture = random.normal(0, NOISE, shape).astype(np.float32)
    inside = sum((c - at) ** 2 for c, at in zip(np.indices(shape), disc, strict=True)) <= RADIUS**2
    picture[inside] += 1.5
    for at, one in zip(markers, (kind, 3 - kind), strict=False):
        picture[_box(at)] += square(one, dims)
    taken = [disc, *markers]
    while len(taken) < 1 + len(markers) + DISTRACTORS:
        at = random.integers(EDGE, np.array(shape) - EDGE)
        if min(np.abs(at - other).max() for other in taken) > RADIUS + EDGE:
            taken.append(at)
            picture[_box(at)] += square(0, dims)
    return Picture(picture, np.where(inside, kind, 0).astype(np.uint8), disc, markers)


def square(kind: int, dims: int) -> np.ndarray:
    """A square or a cube: bright (1), dark (2) or chequered (0)."""
    chequered = 2 - 4 * (np.indices((SQUARE,) * dims).sum(0) % 2)
    return {0: chequered, 1: np.abs(chequered), 2: -np.abs(chequered)}[kind].astype(np.float32)


def _places(task: str, distance: float, random: np.random.Generator, shape: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The centres of the disc and of the markers, all of them inside."""
    while True:
        disc = random.integers(RADIUS + 1, shape - RADIUS - 1)
        direction = random.normal(size=len(shape)) if task == "kind" else -np.eye(len(shape))[-1]
        away = np.rint(distance * direction / np.linalg.norm(direction)).astype(int)
        markers = [disc + away] if task == "kind" else [disc + away, disc - away]
        if all(((at >= EDGE) & (at < shape - EDGE)).all() for at in markers):
            return disc, markers


def _box(at: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(c - EDGE, c + EDGE + 1) for c in at)


def batch(task: str, size: int, seed: int, step: int, dims: int = 2, patch: int | None = None) -> tuple[Tensor, Tensor]:
    """Training pictures (size, 1, *spatial) and labels of one step, of all distances; `patch` cuts out a part that holds the disc."""
    random = np.random.default_rng([1, seed, step])
    shape = np.array(SHAPES[task, dims])
    pictures = []
    for i in range(size):
        one = draw(task, random.choice(DISTANCES[task]), 1 + i % 2, random, dims)
        if patch:
            sides = np.minimum(patch, shape)
            low, high = np.maximum(one.disc + RADIUS + 1 - sides, 0), np.minimum(one.disc - RADIUS, shape - sides)
            part = tuple(slice(start, start + side) for start, side in zip(random.integers(low, high + 1), sides, strict=True))
            one = one._replace(image=one.image[part], label=one.label[part])
        pictures.append(one)
    return _stacked(pictures)


def tests(task: str, distance: int, count: int, dims: int = 2) -> tuple[Tensor, Tensor]:
    """The test pictures (count, 1, *spatial) of a distance and their labels: the same for every network."""
    return _stacked([draw(task, distance, 1 + i % 2, np.random.default_rng([2, distance, i]), dims) for i in range(count)])


def _stacked(pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
    return (
        torch.from_numpy(np.stack([one.image for one in pictures]))[:, None],
        torch.from_numpy(np.stack([one.label for one in pictures]))[:, None].long(),
    )


# -- the networks -----------------------------------------------------------------------------------------------------------------

SHALLOW = {"features": (6, 12, 32), "depths": (0, 1, 1), "decoder_depths": (0, 0)}  # mixers at a quarter of the resolution
DEEP = {"features": (6, 12, 24, 32), "depths": (0, 1, 1, 1), "decoder_depths": (0, 0, 0)}


class Convolution(nn.Module):
    """What stands in a mixer's place: a full 3 x 3 convolution to `hidden` channels and a linear layer back, (b, *spatial, c) -> the same shape."""

    def __init__(self, channels: int, hidden: int, dims: int) -> None:
        super().__init__()
        self.near = CONV[dims](channels, hidden, 3, padding=1)
        self.out = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, c) -> the same shape."""
        return self.out(nn.functional.silu(tokens(self.near(image(x)))))


class LargeKernel(nn.Module):
    """What stands in a mixer's place: a depthwise convolution with a large kernel and a linear layer, (b, *spatial, c) -> the same shape."""

    def __init__(self, channels: int, kernel: int, dims: int) -> None:
        super().__init__()
        self.wide = CONV[dims](channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, c) -> the same shape."""
        return self.out(nn.functional.silu(tokens(self.wide(image(x)))))


def ours(dims: int, **options: Any) -> nn.Module:
    """medssm_unet with these options, in the shallow form where they do not say otherwise."""
    options = {**SHALLOW, **options}
    if "expand" in MIXERS[options.get("mixer", "ss_nd")].options:
        options = {"expand": 1, **options}
    return medssm.create_model("medssm_unet", dims, out_channels=3, **options)


def replaced(dims: int, make: Callable[..., nn.Module], width: int, **options: Any) -> nn.Module:
    """medssm_unet with make(channels, width, dims) in place of every mixer."""
    network = ours(dims, **options)
    for block in network.modules():
        if isinstance(block, MixerBlock):
            block.mixer = make(block.norm.normalized_shape[0], width, dims)
    return network


def walked(dims: int, *specs: str, **options: Any) -> nn.Module:
    """medssm_unet whose scans walk these orders and their reverses."""
    return ours(dims, orders=[order for one in map(medssm.orders.parse, specs) for order in (one, one.reversed())], **options)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    **{name: partial(ours, mixer=name) for name in MIXERS},
    "mamba2": partial(ours, mixer="mamba2", d_state=16),
    "none": partial(ours, scans_from=9),
    "conv": partial(replaced, make=Convolution, width=66),
    "large_kernel": partial(replaced, make=LargeKernel, width=7),
    "raster": lambda dims: walked(dims, "raster()"),
    "one_way": lambda dims: ours(dims, orders=["raster()"]),
    "snake": lambda dims: walked(dims, "snake()"),
    "hilbert": lambda dims: walked(dims, "hilbert()"),
    "zigzag": lambda dims: walked(dims, "zigzag()"),
    "half_resolution": partial(ours, scans_from=1),
    "two_blocks": partial(ours, depths=(0, 1, 2)),
    "deep_ss_nd": partial(ours, **DEEP),
    "deep_none": partial(ours, scans_from=9, **DEEP),
    "deep_coarsest": partial(ours, scans_from=3, **DEEP),
    "basic_unet": lambda dims: BasicUNet(dims, 1, 3, (6, 6, 12, 12, 24, 6), norm="batch"),
}


def field(network: nn.Module, dims: int, size: int = 193) -> int:
    """The furthest voxel along the last axis whose value changes the logits of the voxel in the middle, by the gradient; size // 2 means further."""
    x = torch.zeros(1, 1, *(size if axis == dims - 1 else 33 for axis in range(dims)), requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = torch.randn_like(x)
    network.eval()(x + noise)[(0, slice(None), *(n // 2 for n in x.shape[2:]))].square().sum().backward()
    along = x.grad[0, 0].abs().amax(tuple(range(dims - 1))).nonzero().flatten()
    return int((along - size // 2).abs().max())


# -- runs -------------------------------------------------------------------------------------------------------------------------


def run(
    path: Path,
    network: str,
    task: str,
    seed: int,
    *,
    dims: int = 2,
    patch: int | None = None,
    steps: int = 600,
    size: int = 16,
    lr: float = 6e-3,
    count: int = 100,
) -> dict[str, Any]:
    """Train a network and test it; the result is written to `path`. A run that is there is read; one that was stopped goes on from its save."""
    if path.exists():
        return dict(read_json(path))
    torch.manual_seed(seed)
    model = NETWORKS[network](dims)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds_per_voxel": round(multiply_adds(NETWORKS[network](dims), torch.zeros(1, 1, *[32] * dims)) / 32**dims),
        "field": field(model, dims),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    loss_of = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    save, first, curve, seconds = path.with_suffix(".pt"), 0, [], 0.0
    if save.exists():
        state = torch.load(save, weights_only=True)
        first, curve, seconds = state["step"], state["curve"], state["seconds"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    model.train()
    begun = time.perf_counter() - seconds
    for step in range(first, steps):
        x, y = batch(task, size, seed, step, dims, patch)
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        curve.append(round(float(loss.detach()), 3))
        if (step + 1) % SAVE == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            with atomic(save) as temporary:
                torch.save(state | {"step": step + 1, "curve": curve, "seconds": time.perf_counter() - begun}, temporary)
    seconds = time.perf_counter() - begun
    model.eval()
    ways: dict[str, Callable[[Tensor], Tensor]] = {"whole": model}
    if patch:
        ways["windows"] = lambda x: sliding_window_inference(x, (patch,) * dims, 16, model, 0.5, "gaussian")
    result = {
        "network": network,
        "task": task,
        "seed": seed,
        "dims": dims,
        "patch": patch,
        "steps": steps,
        "batch": size,
        "learning_rate": lr,
        **facts,
        "seconds": round(seconds),
        "loss": curve[SAVE - 1 :: SAVE],
        "tests": {way: {str(d): counts(find, *tests(task, d, count, dims)) for d in DISTANCES[task]} for way, find in ways.items()},
        "commit": _commit(),
        "machine": machine.describe(),
    }
    write_json(path, result)
    save.unlink(missing_ok=True)
    return result


@torch.no_grad()
def counts(find: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> dict[str, str]:
    """Numbers with spaces between, one for each picture: voxels found as class 1, as class 2, and rightly; those of the disc; whether the disc has
    the right name (1) or not (0): the name is the class of the greater mean logit in it."""
    logits = torch.cat([find(part) for part in x.split(20)]).flatten(2)
    label = y.flatten(1)
    found, disc, kind = logits.argmax(1), label > 0, label.amax(1)
    name = 1 + ((logits[:, 2] - logits[:, 1]) * disc).sum(1).gt(0).long()
    columns = {"as1": (found == 1).sum(1), "as2": (found == 2).sum(1), "right": ((found == label) & disc).sum(1), "disc": disc.sum(1)}
    columns["named"] = (name == kind).long()
    return {key: " ".join(map(str, value.tolist())) for key, value in columns.items()}


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return found.stdout.strip()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the results, a JSON file for each run")
    parser.add_argument("--networks", nargs="+", default=["ss_nd", "conv", "none"], choices=NETWORKS)
    parser.add_argument("--tasks", nargs="+", default=["kind"], choices=DISTANCES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--dims", type=int, default=2, choices=(2, 3))
    parser.add_argument("--patch", type=int, help="train on parts of this side instead of whole pictures")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--presets", action="store_true", help="write how many pixels medssm_unet's presets see without mixers, and stop")
    given = parser.parse_args()
    if given.presets:
        seen = {size: field(medssm.create_model("medssm_unet", 2, size=size, scans_from=9), 2, 1025) for size in ("tiny", "small", "base")}
        write_json(given.out / "presets.json", {"sees": seen, "commit": _commit(), "machine": machine.describe()})
        return
    for seed, task, network in itertools.product(given.seeds, given.tasks, given.networks):
        form = f"{given.dims}d-{task}-{network}-{f'patch{given.patch}' if given.patch else 'whole'}-seed{seed}"
        result = run(given.out / f"{form}.json", network, task, seed, dims=given.dims, patch=given.patch, steps=given.steps)
        for way, of_distance in result["tests"].items():
            named = ", ".join(f"{d}: {np.mean([int(n) for n in test['named'].split()]):.2f}" for d, test in of_distance.items())
            print(f"{form}, {way}: named rightly by distance {named}", flush=True)


if __name__ == "__main__":
    main()
