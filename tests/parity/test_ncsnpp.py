"""NCSN++ against diffusers (built tiny and random) and against the published numbering, read step by step; its file.

The published code is in no package; `Walk` below takes its numbered modules in the order in which it runs them, with
resampling by zero insertion, and shares nothing with the network or its layout.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.convert.keymap import Row, to_foreign, to_native
from nexus.convert.layouts.ncsnpp import LAYOUTS
from nexus.convert.sandbox import copy_tensors
from nexus.errors import ModelError
from nexus.models.diffusion.ncsnpp import NCSNpp, NCSNppConfig
from tests.parity.whole import assert_close, assert_round_trip, shapes

ORIGINAL, = LAYOUTS
ROOT2 = math.sqrt(2.0)
FAMILY = {
    "rectified flow, CIFAR-10": {"channels": 16, "mult": (1, 2, 2), "blocks": 2, "attention": (1,)},
    "DDPM++": {"channels": 16, "mult": (1, 2), "blocks": 1, "attention": (0, 1), "block": "ddpm"},
    "DDPM++ with a residual input": {"channels": 16, "mult": (1, 2, 2), "blocks": 1, "attention": (1,),
                                     "block": "ddpm", "progressive_input": "residual"},
    "NCSN++, CIFAR-10": {"channels": 16, "mult": (1, 2), "blocks": 2, "attention": (1,), "fir": True,
                         "embedding": "fourier", "progressive_input": "residual", "scale_by_time": True},
    "NCSN++, 256 pixels": {"channels": 16, "mult": (1, 1, 2), "blocks": 1, "attention": (1,), "fir": True,
                           "embedding": "fourier", "progressive": "output_skip", "progressive_input": "input_skip",
                           "scale_by_time": True},
    "no rescaling": {"channels": 16, "mult": (1, 2), "blocks": 1, "attention": (), "skip_rescale": False},
}


def random_net(fields) -> NCSNpp:
    torch.manual_seed(0)
    net = NCSNppConfig.parse({"dropout": 0.0, **fields}).build().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.15)
    return net


def sparse(x, gain, *, up=1, down=1, pad):
    """Zeros between the pixels, zeros around them, the filter, every down-th pixel."""
    b, c, h, w = x.shape
    wide = x.new_zeros(b, c, h * up, w * up)
    wide[:, :, ::up, ::up] = x
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = torch.outer(taps, taps) / 64 * gain
    rows = F.pad(wide, (pad[0], pad[1], pad[0], pad[1])).reshape(b * c, 1, h * up + sum(pad), w * up + sum(pad))
    out = F.conv2d(rows, kernel[None, None])
    return out.reshape(b, c, *out.shape[-2:])[:, :, ::down, ::down]


class Walk:
    """The published forward pass over keys `all_modules.N.*`, counting N as it goes."""

    def __init__(self, state, c):
        self.state, self.c, self.n, self.used = state, c, 0, set()
        self.share = ROOT2 if c.skip_rescale else 1.0

    def get(self, name):
        key = f"all_modules.{self.n}.{name}"
        self.used.add(key)
        return self.state[key]

    def has(self, name):
        return f"all_modules.{self.n}.{name}" in self.state

    def done(self, result):
        self.n += 1
        return result

    def norm(self, x, name):
        dot = f"{name}." if name else ""
        return F.group_norm(x, min(x.shape[1] // 4, 32), self.get(dot + "weight"), self.get(dot + "bias"), 1e-6)

    def conv(self, x, name, **how):
        dot = f"{name}." if name else ""
        weight = self.get(dot + "weight")
        how = {"padding": weight.shape[-1] // 2} | how
        return F.conv2d(x, weight, self.get(dot + "bias"), **how)

    def nin(self, x, name):
        return torch.einsum("bihw,io->bohw", x, self.get(f"{name}.W")) + self.get(f"{name}.b")[:, None, None]

    def shrink(self, x):
        return sparse(x, 1, down=2, pad=(1, 1)) if self.c.fir else F.avg_pool2d(x, 2)

    def grow(self, x):
        return sparse(x, 4, up=2, pad=(2, 1)) if self.c.fir else x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def res(self, x, emb, way=lambda x: x):
        h = self.conv(way(F.silu(self.norm(x, "GroupNorm_0"))), "Conv_0")
        h = h + (F.silu(emb) @ self.get("Dense_0.weight").T + self.get("Dense_0.bias"))[:, :, None, None]
        h = self.conv(F.silu(self.norm(h, "GroupNorm_1")), "Conv_1")
        x = way(x)
        x = self.nin(x, "NIN_0") if self.has("NIN_0.W") else self.conv(x, "Conv_2") if self.has("Conv_2.weight") else x
        return self.done((x + h) / self.share)

    def attention(self, x):
        h = self.norm(x, "GroupNorm_0")
        q, k, v = (self.nin(h, f"NIN_{i}").flatten(2) for i in range(3))
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(-1)                  # [B, to, from]
        h = (v @ weights.transpose(1, 2)).reshape(x.shape)
        return self.done((x + self.nin(h, "NIN_3")) / self.share)

    def layer(self, x, how):
        return self.done(how(x, ""))

    def linear(self, x, _):
        return x @ self.get("weight").T + self.get("bias")

    def strided(self, x):
        """3x3, stride 2: after the filter, or padded on the right and below."""
        if self.has("Conv2d_0.weight"):
            return self.done(self.conv(sparse(x, 1, pad=(2, 2)), "Conv2d_0", stride=2, padding=0))
        return self.done(self.conv(F.pad(x, (0, 1, 0, 1)), "Conv_0", stride=2, padding=0))

    def embed(self, t):
        if self.c.embedding == "fourier":
            angles = t.log()[:, None] * self.get("W")[None] * 2 * math.pi
            self.n += 1
        else:
            half = self.c.channels // 2
            angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
        wave = torch.cat([angles.sin(), angles.cos()], 1)
        return self.layer(F.silu(self.layer(wave, self.linear)), self.linear)

    def down(self, x, emb):
        skips, picture = [self.layer(x, self.conv)], x
        for level in range(len(self.c.mult)):
            for _ in range(self.c.blocks):
                h = self.res(skips[-1], emb)
                skips.append(self.attention(h) if level in self.c.attention else h)
            if level + 1 < len(self.c.mult):
                h = self.res(skips[-1], emb, self.shrink) if self.c.block == "biggan" else self.strided(skips[-1])
                if self.c.progressive_input == "input_skip":
                    picture = self.shrink(picture)
                    h = self.done(self.conv(picture, "Conv") + h)
                elif self.c.progressive_input == "residual":
                    h = picture = (self.strided(picture) + h) / self.share
                skips.append(h)
        return skips

    def __call__(self, x, t):
        emb = self.embed(t)
        skips = self.down(x, emb)
        h = self.res(self.attention(self.res(skips[-1], emb)), emb)
        picture = None
        for level in reversed(range(len(self.c.mult))):
            for _ in range(self.c.blocks + 1):
                h = self.res(torch.cat([h, skips.pop()], 1), emb)
            if level in self.c.attention:
                h = self.attention(h)
            if self.c.progressive == "output_skip":
                own = self.layer(F.silu(self.layer(h, self.norm)), self.conv)
                picture = own if picture is None else self.grow(picture) + own
            if level:
                h = self.res(h, emb, self.grow) if self.c.block == "biggan" else \
                    self.done(self.conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3), "Conv_0"))
        out = self.layer(F.silu(self.layer(h, self.norm)), self.conv) if picture is None else picture
        return out / t[:, None, None, None] if self.c.scale_by_time else out


@pytest.mark.parametrize("name", FAMILY)
def test_the_published_numbering_and_arithmetic(name):
    net = random_net(FAMILY[name])
    config = {"net": net.config.to_json()}
    state = to_foreign(ORIGINAL.table(config), net.state_dict())
    walk = Walk(state, net.config)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([999.0, 17.3])
    with torch.no_grad():
        reference = walk(x, t)
        assert_close(net(x, t), reference)
    assert walk.used == state.keys() and reference.std() > 1e-3
    assert walk.n == 1 + max(int(key.split(".")[1]) for key in state)


@pytest.mark.parametrize("name", FAMILY)
def test_shapes_tell_the_architecture_and_the_file_comes_back_byte_for_byte(name):
    net = random_net(FAMILY[name])
    config = {"net": net.config.to_json()}
    state = to_foreign(ORIGINAL.table(config), net.state_dict())
    assert ORIGINAL.matches(shapes(state), None)
    found = ORIGINAL.config(shapes(state), None)
    unsaid = [setting.removeprefix("net.") for setting in ORIGINAL.unsaid(shapes(state), None)]
    known = {key: value for key, value in found["net"].items() if key not in unsaid}
    assert known.items() <= config["net"].items()
    other = NCSNppConfig.parse({**found["net"], **{k: config["net"][k] for k in unsaid if k in config["net"]}}).build()
    other.load_state_dict(to_native(ORIGINAL.table(config), state))
    assert_round_trip(ORIGINAL, other, config, state)


def diffusers_rows(levels: int, attention: set[int], blocks: int) -> list[Row]:
    """diffusers' UNet2DModel of skip blocks, which has the same parts under other names."""
    def layer(native, foreign):
        return [Row(f"{native}.{end}", f"{foreign}.{end}") for end in ("weight", "bias")]

    def res(native, foreign):
        names = {"norm1": "norm1", "conv1": "conv1", "emb_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
                 "skip": "conv_shortcut"}
        return [row for ours, its in names.items() for row in layer(f"{native}.{ours}", f"{foreign}.{its}")]

    def attn(native, foreign):
        return [*layer(f"{native}.norm", f"{foreign}.group_norm"), *layer(f"{native}.proj", f"{foreign}.to_out.0"),
                *(Row(f"{native}.qkv.{end}", tuple(f"{foreign}.to_{p}.{end}" for p in "qkv"))
                  for end in ("weight", "bias"))]

    rows = [Row("time.freqs", "time_proj.weight"), *layer("time.fc1", "time_embedding.linear_1"),
            *layer("time.fc2", "time_embedding.linear_2"), *layer("conv_in", "conv_in"),
            *res("mid.res.*", "mid_block.resnets.*"), *attn("mid.attn.*", "mid_block.attentions.*")]
    for i in range(levels):
        down, up = f"down_blocks.{i}", f"up_blocks.{i}"
        rows += [*res(f"down.{i}.res.*", f"{down}.resnets.*"), *attn(f"down.{i}.attn.*", f"{down}.attentions.*"),
                 *res(f"down.{i}.resample", f"{down}.resnet_down"), *layer(f"down.{i}.join", f"{down}.skip_conv"),
                 *res(f"up.{i}.res.*", f"{up}.resnets.*"), *attn(f"up.{i}.attn.*", f"{up}.attentions.*"),
                 *res(f"up.{i}.resample", f"{up}.resnet_up")]
        last = i == levels - 1
        rows += [*layer(f"up.{i}.side.norm", "conv_norm_out" if last else f"{up}.skip_norm"),
                 *layer(f"up.{i}.side.conv", "conv_out" if last else f"{up}.skip_conv")]
    return rows


def test_diffusers_output_and_round_trip_with_the_filter():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    reference = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 128), layers_per_block=2, time_embedding_type="fourier",
        norm_eps=1e-6, norm_num_groups=None, mid_block_scale_factor=ROOT2, attention_head_dim=None,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D")).eval()
    state = reference.state_dict()
    rows = diffusers_rows(2, {1}, 2)
    net = NCSNppConfig(channels=32, mult=(1, 4), blocks=2, attention=(1,), fir=True, embedding="fourier", dropout=0.0,
                       progressive="output_skip", progressive_input="input_skip", scale_by_time=True).build().eval()
    net.load_state_dict(to_native(rows, state))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.7, 40.0])
    with torch.no_grad():
        assert_close(net(x, t), reference(x, t).sample)
    back = to_foreign(rows, net.state_dict())
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


# --- checkpoint_N.pth ----------------------------------------------------------------------------------------------

def saved(net, path, *, spoil=None):
    """What rectified flow's code writes: weights under `module.`, a table of sigmas, a bare list of averages."""
    state = to_foreign(ORIGINAL.table({"net": net.config.to_json()}), net.state_dict())
    order = sorted(state, key=lambda key: (int(key.split(".")[1]), list(state).index(key)))
    model = {"module.sigmas": torch.linspace(1, 2, 1000)} | {f"module.{key}": state[key] for key in order}
    average = [state[key] + 1 for key in order if key != "all_modules.0.W"]
    if spoil:
        average = spoil(average)
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save({"optimizer": optimizer, "model": model, "step": 7,
                "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": average}}, path)
    return state


@pytest.mark.parametrize("name", ["rectified flow, CIFAR-10", "NCSN++, CIFAR-10"])
def test_the_published_file_gives_its_averages(name, tmp_path):
    net = random_net(FAMILY[name])
    state = saved(net, tmp_path / "checkpoint_10.pth")
    report = convert(tmp_path / "checkpoint_10.pth", tmp_path / "model")
    assert report.layout == "rectified-flow/original" and not report.problems and report.dropped == ("sigmas",)
    assert any("averaged" in note for note in report.notes)
    convert(tmp_path / "model", tmp_path / "back.safetensors", to="original")
    back = checkpoint.read_tensors(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value if key == "all_modules.0.W" else value + 1) for key, value in state.items())
    loaded = checkpoint.load(str(tmp_path / "model"), device="cpu")
    assert loaded.config.net == net.config.model_copy(update={"dropout": loaded.config.net.dropout})
    assert loaded.config.latent_shape == (3, *[{"rectified": 16}.get(name.split()[0], 8)] * 2)


def test_a_list_of_averages_of_another_model_is_refused(tmp_path):
    saved(random_net(FAMILY["no rescaling"]), tmp_path / "x.pth", spoil=lambda listed: listed[::-1])
    with pytest.raises(ModelError, match="does not follow its model"):
        copy_tensors(str(tmp_path / "x.pth"), str(tmp_path / "out.safetensors"))
