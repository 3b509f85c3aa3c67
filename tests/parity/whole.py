"""What the comparisons share: a foreign state in our network and back, how near two outputs are, whole pipelines.

A state is what a checkpoint holds, tensors by name; of a pipeline there are a small picture codec, our system with its
weights and conditions that are given.
"""

import torch

from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts import kl_image


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def loaded(layouts, layout, state, net_config_class, foreign=None, **said) -> tuple[torch.nn.Module, dict]:
    """Our network with a state that of `layouts` only `layout` knows, and its config; `said`: settings of the net."""
    assert [one.name for one in layouts if one.matches(shapes(state), foreign)] == [layout.name]
    config = layout.config(shapes(state), foreign)
    config["net"] |= said
    rest = {key: tensor for key, tensor in state.items() if key not in layout.constants(config)}
    net = net_config_class.parse(config["net"]).build().eval()
    net.load_state_dict(to_native(layout.table(config), rest))
    return net, config


def assert_round_trip(layout, net, config, state):
    """The network written in the layout is the state, bit for bit."""
    back = to_foreign(layout.table(config), net.state_dict(), copies=layout.copies(config)) | layout.constants(config)
    assert back.keys() == state.keys(), back.keys() ^ state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def assert_close(ours, reference):
    difference, most = (ours - reference).abs().max(), reference.abs().max()
    assert difference <= 1e-4 * max(1.0, most), (difference, most)


def tiny_codec(diffusers):
    """Random, two pixels to a latent position."""
    return diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
                                   down_block_types=("DownEncoderBlock2D",) * 2,
                                   up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5).eval()


def randomise(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights, biases and norms among them, that keep the scale of what goes through."""
    torch.manual_seed(seed)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5 if p.ndim == 1 else p[0].numel() ** -0.5)
    return net.eval()


def louder(net, factor: float = 1.5):
    """Larger random weights, so that the conditions and the time show in the picture."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(factor)
    return net.eval()


def ours_of(pipe, config_class, layout, state, **changes) -> torch.nn.Module:
    """Our system with a pipeline's codec and the transformer's weights; `changes` are settings of the Config."""
    vae, said = pipe.vae.state_dict(), dict(pipe.vae.config)
    picture = next(one for one in kl_image.LAYOUTS if one.matches(shapes(vae), said))
    codec = picture.config(shapes(vae), said)
    config = layout.config(shapes(state), dict(pipe.transformer.config))
    config["net"] |= changes.pop("net", {})
    system = config_class.parse(config | {"codec": {"net": codec["net"]}} | changes).build().eval()
    system.net.load_state_dict(to_native(layout.table(config), state))
    system.codec.load_state_dict(to_native(picture.table(codec), vae))
    return system


class Given(torch.nn.Module):
    """A conditioner of one prompt: its conditions and the null's, each with a batch of 1."""

    def __init__(self, cond, null):
        super().__init__()
        self.cond, self.no = cond, null

    def check(self, prompt):
        pass

    def prompts(self, prompts, device):
        return {n: v.repeat(len(prompts), *[1] * (v.ndim - 1)) for n, v in self.cond.items()}, ()

    def null(self, n, device):
        return {name: v.repeat(n, *[1] * (v.ndim - 1)) for name, v in self.no.items()}
