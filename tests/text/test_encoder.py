"""The small text encoder: any text in, finite vectors out, words that share letters near each other."""

import pytest
import torch

from nexus.text.conditioner import TextCondConfig
from nexus.text.encoder import TextEncoderConfig, letter_groups

CONFIG = TextEncoderConfig(words=("apple", "cat", "red"), dim=16, depth=2, buckets=64, length=5)
TEXTS = ["", " ", "\n\t", "red apple", "RED, Apple!", "zebra", "\U0001f34e\U0001f34e", "\u0645\u0631\u062d\u0628\u0627",
         "e\u0301clair", "a" * 100_000, "word " * 10_000, "\0", "{}%s$(x)<b>", "\udcff", "1 2 3"]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return CONFIG.build().eval()


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_gives_finite_vectors(text, encoder):
    out = encoder([text])
    assert out["context"].shape == (1, 5, 16) and out["context"].isfinite().all()
    assert out["context_mask"].dtype == torch.bool and 1 <= out["context_mask"].sum() <= 5
    assert torch.equal(out["pooled"], out["context"][:, 0])
    assert encoder.remarks(text).keys() <= {"cut", "unknown"}


def test_case_and_punctuation_do_not_matter(encoder):
    a, b = encoder(["red apple"])["context"], encoder(["RED, Apple!"])["context"]
    assert torch.equal(a, b)


def test_the_order_of_words_matters(encoder):
    a, b = encoder(["red apple", "apple red"])["pooled"]
    assert not torch.allclose(a, b)


def test_padding_is_not_seen(encoder):
    alone, beside = encoder(["red"])["context"][0], encoder(["red", "red apple cat red"])["context"][0]
    torch.testing.assert_close(alone[:2], beside[:2])


def test_every_weight_that_a_caption_uses_gets_a_gradient():
    encoder = CONFIG.build()
    encoder(["red zebra", ""])["context"].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    used = set(encoder.word.weight.grad.abs().sum(1).nonzero().flatten().tolist())
    assert used == {2, 3}                       # "red", and the row of words that are not in the list


def test_words_that_share_letters_share_groups():
    def likeness(a, b):
        x, y = (set(letter_groups(w, 2**30)) for w in (a, b))
        return len(x & y) / len(x | y)
    assert likeness("apple", "apples") > 0.5 > likeness("apple", "zebra") == 0
    assert all(0 <= g < 7 for g in letter_groups("strawberry", 7)) and letter_groups("", 8)


def test_the_vocabulary_is_taken_from_the_data_once():
    texts = ["Red apple", "cat, flat style", "red cat"]
    fitted = TextEncoderConfig().adapt(texts)
    assert fitted.words == ("apple", "cat", "flat", "red", "style")
    assert fitted.adapt(["other words"]) == fitted and TextEncoderConfig().adapt(texts[::-1]) == fitted


def test_half_precision_and_the_meta_device(encoder):
    half = CONFIG.build().to(torch.bfloat16)
    assert half(["red apple"])["context"].dtype == torch.bfloat16
    with torch.device("meta"):
        assert all(p.device.type == "meta" for p in CONFIG.build().parameters())


def test_the_share_of_captions_without_style_is_as_asked():
    conditioner = TextCondConfig(encoder=CONFIG, style_dropout=0.25).adapt(("apple",), ("noto", "flat")).build()
    seen = []
    conditioner.encoder.forward = lambda texts: seen.extend(texts) or {}
    batch = {"caption": ["apple"] * 4000, "style": torch.tensor([0, 1] * 2000)}
    conditioner.training_cond(batch, torch.Generator().manual_seed(0))
    assert abs(seen.count("apple") / 4000 - 0.25) < 0.03
    assert {t for t in seen if t != "apple"} == {"apple, noto style", "apple, flat style"}


def test_a_default_style_is_added_only_where_none_is_named():
    conditioner = TextCondConfig(encoder=CONFIG, default_style="flat").adapt((), ("noto", "flat")).build().eval()
    _, notes = conditioner.prompts(["red apple", "red apple, noto style", None], torch.device("cpu"))
    assert [n.get("caption") for n in notes] == ["red apple, flat style", "red apple, noto style", None]
