"""The VQ picture codec against diffusers' VQModel: ids, pictures, losses, files both ways."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from nexus import checkpoint
from nexus.codecs.vq_image import VQConfig
from nexus.convert.convert import convert
from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts.kl_image import LAYOUTS
from nexus.errors import ModelError
from nexus.models.cv.vae.vae import VAEConfig
from tests.parity.codecs import assert_same_weights_back, blocks, diffusers_codec, near, with_ours

BY_NAME = {layout.name: layout for layout in LAYOUTS}
CONFIGS = {
    "plain": {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_vq_embeddings": 24},
    "narrow-codes": {"block_out_channels": (16, 16, 32), "norm_num_groups": 8, "latent_channels": 8, "vq_embed_dim": 2,
                     "layers_per_block": 2, "num_vq_embeddings": 40, "scaling_factor": 1.7},
    "attends": {"block_out_channels": (8, 16, 24), "norm_num_groups": 8, "num_vq_embeddings": 400,
                **blocks(3, (0, 2))},
    "no-attention": {"block_out_channels": (8, 24), "norm_num_groups": 8, "mid_block_add_attention": False,
                     "num_vq_embeddings": 9, "in_channels": 1, "out_channels": 1},
}


def diffusers_model(fields: dict):
    model = diffusers_codec("VQModel", fields)
    # published ones are spread like the latents
    torch.nn.init.normal_(model.quantize.embedding.weight, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """diffusers' model, its folder, and the native system converted from it."""
    return with_ours(diffusers_model(CONFIGS[request.param]), tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def test_ids_pictures_and_latents_are_diffusers(pair):
    model, _, ours = pair
    x = 3 * torch.randn(2, model.config.in_channels, 16, 24, generator=torch.Generator().manual_seed(1))
    z = model.encode(x).latents
    assert near(ours.net.encode(x), z)
    rows, loss, (_, _, ids) = model.quantize(z)
    coded = ours.net.coded(z)
    assert torch.equal(coded.ids.flatten(), ids.flatten()) and len(set(ids.tolist())) > 2
    assert near(coded.z, rows) and near(ours.net.rows(coded.ids), rows)
    legacy = coded.to_rows + 0.25 * coded.to_z          # theirs weighs the two the other way round, and says so
    assert near(legacy, loss)
    assert near(ours.net.decode_raw(rows), model.decode(rows, force_not_quantize=True).sample)
    assert near(ours.net.latents(x), z * model.config.scaling_factor)
    assert near(ours.net.decode(z * model.config.scaling_factor), model.decode(z).sample)
    assert near(ours.rebuilt(x), model(x).sample)


def test_folder_round_trip_is_exact(pair):
    model, folder, _ = pair
    assert_same_weights_back(folder)
    said, again = (json.loads((folder / name / "config.json").read_text()) for name in ("theirs", "back"))
    width = said.pop("vq_embed_dim") or said["latent_channels"]
    assert again["vq_embed_dim"] == width
    assert all(again[key] == value for key, value in said.items() if key != "_diffusers_version")
    assert model.from_pretrained(folder / "back").config.num_vq_embeddings == model.config.num_vq_embeddings


def test_single_files_of_vqgan_and_latent_diffusion_are_read(tmp_path):
    """Their names are those of the KL codec's single files, which the parity cases check, and the codebook's."""
    torch.manual_seed(1)
    ours = VAEConfig.parse({"likelihood": "laplace", "net": {
        "kind": "vq", "channels": (32, 64), "blocks": 1, "attention": (1,), "bins": 12, "dim": 3, "size": 16}}).build()
    for name, prefix in (("original", ""), ("original-sd", "first_stage_model.")):
        state = to_foreign(BY_NAME[name].table(ours.config.to_json()), ours.net.state_dict())
        assert f"{prefix}quantize.embedding.weight" in state and f"{prefix}encoder.down.1.block.0.conv1.weight" in state
        assert {key for key in state if ".attn." in key} == {
            f"{prefix}{side}.1.attn.{j}.{part}.{end}" for side, count in (("encoder.down", 1), ("decoder.up", 2))
            for j in range(count) for part in ("norm", "q", "k", "v", "proj_out") for end in ("weight", "bias")}
        assert state[f"{prefix}encoder.down.1.attn.0.q.weight"].shape == (64, 64, 1, 1)
        beside = {"loss.discriminator.main.0.bias": torch.zeros(2)} if not prefix else \
            {"model.other.bias": torch.zeros(2)}
        file = tmp_path / f"{name}.safetensors"
        save_file({k: t.contiguous() for k, t in (state | beside).items()}, file)
        convert(file, tmp_path / name)
        read = checkpoint.load(str(tmp_path / name))
        assert all(torch.equal(t, ours.net.state_dict()[k]) for k, t in read.net.state_dict().items())
        assert read.config.net.model_copy(update={"size": 16}) == ours.config.net


@pytest.mark.parametrize("name", ["vq-f4", "vq-f8", "vq-f16", "vqgan-imagenet"])
def test_the_published_size_is_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    net = VQConfig.preset(name)
    with torch.device("meta"):
        ours = net.build()
        theirs = diffusers.VQModel(
            block_out_channels=net.channels, layers_per_block=net.blocks, num_vq_embeddings=net.bins,
            latent_channels=net.latent_channels, **blocks(len(net.channels), net.attention))
    table = BY_NAME["diffusers"].table({"net": net.to_json()})
    state = theirs.state_dict()
    shapes = {k: t.shape for k, t in ours.state_dict().items()}
    assert {k: t.shape for k, t in to_native(table, state).items()} == shapes
    assert sum(t.numel() for t in ours.state_dict().values()) == sum(t.numel() for t in state.values())


def test_what_this_codec_has_not_is_refused(tmp_path):
    model = diffusers_model(CONFIGS["plain"])
    shapes = {k: tuple(t.shape) for k, t in model.state_dict().items()}
    config = dict(model.config)
    with pytest.raises(ModelError, match="spatial"):
        BY_NAME["diffusers"].config(shapes, config | {"norm_type": "spatial"})
    net = VAEConfig.parse({"likelihood": "laplace", "net": {"kind": "vq", "shift": 0.5, "size": 16}})
    with pytest.raises(ModelError, match="shift"):
        BY_NAME["diffusers"].foreign_config(net.to_json())


def test_training_moves_codes_to_latents_and_latents_to_codes():
    torch.manual_seed(0)
    ours = VAEConfig.preset("tiny-vq").build()
    z = torch.randn(2, 4, 8, 8, requires_grad=True)
    coded = ours.net.coded(z)
    rows = F.embedding(coded.ids, ours.net.codes.weight).movedim(-1, 1)
    flat = z.movedim(1, -1).flatten(0, 2)
    assert torch.equal(coded.ids.flatten(), torch.cdist(flat, ours.net.codes.weight).argmin(1))
    assert torch.allclose(coded.z, rows) and torch.allclose(coded.to_rows, (z - rows).square().mean())
    coded.to_rows.backward(retain_graph=True)
    assert z.grad.abs().sum() > 0 and ours.net.codes.weight.grad is None
    z.grad = None
    coded.to_z.backward(retain_graph=True)
    assert z.grad is None and ours.net.codes.weight.grad.abs().sum() > 0
    coded.z.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
